/* The ops of a layer beside its products and attention: RMS norm and gated activation, alone and before products. */
#include "products.h"

/* r = x + residual, rounded; normed = r / sqrt(mean(r²) + eps), rounded, times weight.
   All [tokens, width] of one type; residual NULL stands for 0, and total is then not written. */
void add_rms_norm(const struct rows *x, const void *residual, const void *weight, float eps, int64_t width,
                  void *normed, void *total, int threads) {
    enum type t = x->type;
#pragma omp parallel for schedule(static) num_threads(threads) if (x->tokens > 1)
    for (int64_t token = 0; token < x->tokens; token++) {
        size_t n = width, at = bytes_of(t, token * n);
        const char *source = (const char *)x->data + at;
        vf squares = {0};
        for (size_t i = 0; i < n; i += LANES) {
            vf r = load_part(t, source, i, n);
            if (residual) {
                r = rounded(t, r + load_part(t, (const char *)residual + at, i, n));
                store(t, (char *)total + at, i, r, n - i < LANES ? n - i : LANES);
            }
            squares += r * r;
        }
        float scale = 1 / sqrtf(sum(squares) / n + eps);
        const char *from = residual ? (char *)total + at : source;
        for (size_t i = 0; i < n; i += LANES) {
            vf r = rounded(t, load_part(t, from, i, n) * scale);
            store(t, (char *)normed + at, i, r * load_part(t, weight, i, n), n - i < LANES ? n - i : LANES);
        }
    }
}

/* y = silu(gate) * up; x: [tokens, 2 * width], the gate channels before the up channels. */
void silu_mul(const struct rows *x, int64_t width, void *y, int threads) {
    enum type t = x->type;
#pragma omp parallel for schedule(static) num_threads(threads) if (x->tokens > 1)
    for (int64_t token = 0; token < x->tokens; token++) {
        size_t n = width;
        const char *gates = (const char *)x->data + bytes_of(t, 2 * token * n), *ups = gates + bytes_of(t, n);
        for (size_t i = 0; i < n; i += LANES) {
            vf gate = load_part(t, gates, i, n), up = load_part(t, ups, i, n);
            store(t, (char *)y + bytes_of(t, token * n), i, gate / (1.0f + exponential(-gate)) * up,
                  n - i < LANES ? n - i : LANES);
        }
    }
}

/* y = normed @ Wᵀ, with normed and total from add_rms_norm.  Returns 0 if memory is short, else 1. */
int norm_product(const struct rows *x, const void *residual, const void *norm, float eps, void *total,
                 const struct matrix *w, const struct rows *y, int threads) {
    struct rows normed = {malloc(bytes_of(x->type, x->tokens * w->in)), x->tokens, x->type};
    if (!normed.data) return 0;
    add_rms_norm(x, residual, norm, eps, w->in, normed.data, total, threads);
    int done = product(w, &normed, NULL, y, threads);
    free(normed.data);
    return done;
}

/* y = (silu(gate) * up) @ down_projᵀ, with gate and up from norm_product.  Returns 0 if memory is short, else 1. */
int gated_mlp(const struct rows *x, const void *residual, const void *norm, float eps, void *total,
              const struct matrix *gate_up, const struct matrix *down, const struct rows *y, int threads) {
    struct rows wide = {malloc(bytes_of(x->type, x->tokens * gate_up->out)), x->tokens, x->type};
    struct rows gated = {malloc(bytes_of(x->type, x->tokens * down->in)), x->tokens, x->type};
    int done = wide.data && gated.data && norm_product(x, residual, norm, eps, total, gate_up, &wide, threads);
    if (done) {
        silu_mul(&wide, down->in, gated.data, threads);
        done = product(down, &gated, NULL, y, threads);
    }
    free(wide.data);
    free(gated.data);
    return done;
}
