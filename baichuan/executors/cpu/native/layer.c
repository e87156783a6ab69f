/* The ops of a layer beside its products: RMS norm, gated activation, attention. */
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

/* One layer's cache, k and v [rows, heads, capacity, dim], and its position encoding. */
struct cache {
    void *k, *v;
    const float *k_scale, *v_scale; /* [1], with an 8-bit cache */
    const float *cos, *sin;         /* [positions, dim / 2]; NULL without RoPE */
    const float *slopes;            /* [heads]; NULL without ALiBi */
    int64_t heads, capacity, dim;
    int32_t type;
};

static void rotate(const struct cache *c, enum type t, void *head, int64_t position) {
    size_t half = c->dim / 2;
    const float *cos = c->cos + position * half, *sin = c->sin + position * half;
    for (size_t i = 0; i < half; i += LANES) {
        size_t n = half - i < LANES ? half - i : LANES;
        char *second = (char *)head + bytes_of(t, half);
        vf x1 = load_part(t, head, i, half), x2 = load_part(t, second, i, half);
        vf cosine = load_part(F32, cos, i, half), sine = load_part(F32, sin, i, half);
        store(t, head, i, x1 * cosine - x2 * sine, n);
        store(t, second, i, x2 * cosine + x1 * sine, n);
    }
}

static void keep(const struct cache *c, enum type t, const void *head, void *to, const float *scale) {
    for (size_t i = 0; i < (size_t)c->dim; i += LANES) {
        vf x = load_part(t, head, i, c->dim);
        if (c->type == INT8) x = clamp(x / *scale, 127);
        if (c->type == FP8) x = clamp(x / *scale, 448);
        store(c->type, to, i, x, c->dim - i < LANES ? c->dim - i : LANES);
    }
}

/* Rotates q and k of qkv [tokens, 3 * heads * dim] in place (RoPE) and stores k and v.  rows, positions: [tokens] */
void store_tokens(const struct cache *c, const struct rows *qkv, const int64_t *rows, const int64_t *positions,
                  int threads) {
    size_t wide = 3 * c->heads * c->dim;
#pragma omp parallel for schedule(static) num_threads(threads) if (qkv->tokens > 1)
    for (int64_t token = 0; token < qkv->tokens; token++)
        for (int64_t head = 0; head < c->heads; head++) {
            char *q = (char *)qkv->data + bytes_of(qkv->type, token * wide + head * c->dim);
            char *k = q + bytes_of(qkv->type, c->heads * c->dim), *v = k + bytes_of(qkv->type, c->heads * c->dim);
            size_t at = bytes_of(c->type, ((rows[token] * c->heads + head) * c->capacity + positions[token]) * c->dim);
            if (c->cos) {
                rotate(c, qkv->type, q, positions[token]);
                rotate(c, qkv->type, k, positions[token]);
            }
            keep(c, qkv->type, k, (char *)c->k + at, c->k_scale);
            keep(c, qkv->type, v, (char *)c->v + at, c->v_scale);
        }
}

/* One query over `context` keys of one head.  q: [dim], scaled; out: [dim], both with zeros up to LANES. */
INLINE void attend_head(enum type t, const char *keys, const char *values, size_t context, size_t dim, const float *q,
                        float slope, float *scores, float *out) {
    float highest = -INFINITY;
    for (size_t c = 0; c < context; c++) {
        vf total = {0};
        for (size_t i = 0; i < dim; i += LANES)
            total += load_part(t, keys + bytes_of(t, c * dim), i, dim) * LOAD(vf, q + i);
        scores[c] = sum(total) - slope * (float)(context - 1 - c);
        highest = scores[c] > highest ? scores[c] : highest;
    }
    vf totals = {0};
    for (size_t c = 0; c < context; c += LANES) {
        vf p = exponential(load_part(F32, scores, c, context) - highest);
        store(F32, scores, c, p, context - c < LANES ? context - c : LANES);
        totals += load_part(F32, scores, c, context);
    }
    float inverse = 1 / sum(totals);
    memset(out, 0, up_to(dim, LANES) * sizeof *out);
    for (size_t c = 0; c < context; c += 4)
        for (size_t i = 0; i < dim; i += LANES) {
            vf total = LOAD(vf, out + i);
            for (size_t j = c; j < c + 4 && j < context; j++)
                total += load_part(t, values + bytes_of(t, j * dim), i, dim) * (scores[j] * inverse);
            memcpy(out + i, &total, sizeof total);
        }
}

static void attend_typed(const struct cache *c, size_t at, size_t context, const float *q, float slope, float *scores,
                         float *out) {
    const char *k = (char *)c->k + bytes_of(c->type, at), *v = (char *)c->v + bytes_of(c->type, at);
    switch (c->type) {
    case F32: return attend_head(F32, k, v, context, c->dim, q, slope, scores, out);
    case F16: return attend_head(F16, k, v, context, c->dim, q, slope, scores, out);
    case BF16: return attend_head(BF16, k, v, context, c->dim, q, slope, scores, out);
    case INT8: return attend_head(INT8, k, v, context, c->dim, q, slope, scores, out);
    default: return attend_head(FP8, k, v, context, c->dim, q, slope, scores, out);
    }
}

/* softmax(q kᵀ / sqrt(dim) + bias) v of each token over the keys up to its position, once all are stored.
   qkv, rows, positions: as above; longest: above every position; y: [tokens, heads * dim].  Returns 0 if memory is
   short, else 1. */
int attend(const struct cache *c, const struct rows *qkv, const int64_t *rows, const int64_t *positions,
           int64_t longest, void *y, int threads) {
    store_tokens(c, qkv, rows, positions, threads);
    size_t heads = c->heads, dim = c->dim, wide = up_to(dim, LANES);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *q = malloc((2 * wide + longest) * sizeof(float)), *out = q + wide, *scores = out + wide;
#pragma omp for schedule(dynamic)
        for (size_t item = 0; item < qkv->tokens * heads; item++) {
            size_t token = item / heads, head = item % heads;
            if (!q) {
                failed = 1;
                continue;
            }
            const char *source = (const char *)qkv->data + bytes_of(qkv->type, (3 * token * heads + head) * dim);
            float scale = (c->k_scale ? *c->k_scale : 1) / sqrtf(dim), v_scale = c->v_scale ? *c->v_scale : 1;
            for (size_t i = 0; i < dim; i += LANES) {
                vf x = load_part(qkv->type, source, i, dim) * scale;
                memcpy(q + i, &x, sizeof x);
            }
            size_t at = (rows[token] * heads + head) * c->capacity * dim;
            attend_typed(c, at, positions[token] + 1, q, c->slopes ? c->slopes[head] : 0, scores, out);
            for (size_t i = 0; i < dim; i += LANES)
                store(qkv->type, (char *)y + bytes_of(qkv->type, (token * heads + head) * dim), i,
                      LOAD(vf, out + i) * v_scale, dim - i < LANES ? dim - i : LANES);
        }
        free(q);
    }
    return !failed;
}
