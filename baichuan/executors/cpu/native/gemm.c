/* y = x @ Wᵀ for many tokens: W is converted to float32 in blocks that stay in the cache, each block once.

   A panel holds WIDTH tokens as [channels, WIDTH], so that one weight is multiplied by WIDTH tokens at once. */
#include "tile.h"

#if LANES == 8
#define ROWS 6
#else
#define ROWS 12 /* each has two registers of sums */
#endif
#define STRIPE (4 * ROWS)
#define DEPTH  512          /* channels of a block; 127 * 127 * DEPTH < 2^24: exact for 8-bit integers */
#define PITCH  (DEPTH + 16) /* floats between rows, so that rows do not map to the same cache sets */
#define TOKENS 512          /* tokens of one pass over W */
_Static_assert(DEPTH * 127 * 127 < 1 << 24, "a float sums the integers of a block exactly");

static void pack_panel(const struct matrix *w, const struct rows *x, const float *scales, size_t first, size_t n,
                       struct operand *row, float *panel, float *panel_scales) {
    memset(panel, 0, WIDTH * row->stride * sizeof *panel);
    for (size_t t = 0; t < n; t++) {
        struct rows one = {(char *)x->data + (first + t) * bytes_of(x->type, w->in), 1, x->type};
        prepare_token(w, &one, scales ? scales + first + t : NULL, row, 0);
        for (size_t i = 0; i < row->stride; i++) panel[i * WIDTH + t] = row->floats[i];
        panel_scales[t] = operand_scale(w, row, 0);
    }
}

/* Channels i to i + n of a row as floats, zeros up to the next STEP.  INT4: less their zero, times their scale. */
INLINE void unpack(const struct matrix *w, enum type t, size_t row, size_t i, size_t n, float *to) {
    const char *data = (const char *)w->data + row * bytes_of(t, w->in);
    const char *scales = (const char *)w->scale + row * bytes_of(w->scale_type, w->groups);
    size_t group = w->in / w->groups;
    float scale = 1, zero = 0;
    for (size_t k = 0; k < n; k += STEP) {
        vf v[2];
        if (t == INT4 && (k == 0 || (i + k) % group == 0)) {
            scale = load_part(w->scale_type, scales, (i + k) / group, w->groups)[0];
            zero = w->zero ? w->zero[row * w->groups + (i + k) / group] : 0;
        }
        if (k + STEP <= n) load_step(t, data, i + k, v);
        else load_step_part(t, data, i + k, n - k, v);
        if (t == INT4) v[0] = (v[0] - zero) * scale, v[1] = (v[1] - zero) * scale;
        memcpy(to + k, v, sizeof v);
    }
}

static void unpack_row(const struct matrix *w, size_t row, size_t i, size_t n, float *to) {
    switch (w->type) {
    case F32: return unpack(w, F32, row, i, n, to);
    case F16: return unpack(w, F16, row, i, n, to);
    case BF16: return unpack(w, BF16, row, i, n, to);
    case FP8: return unpack(w, FP8, row, i, n, to);
    case INT8: return unpack(w, INT8, row, i, n, to);
    default: return unpack(w, INT4, row, i, n, to);
    }
}

/* sums[ROWS][tokens] += rows of W times a panel, over n channels; with SmoothQuant the sums are exact integers. */
static void add_product(const float *w, const float *panel, size_t n, float *sums, size_t tokens, int integers) {
    vf total[ROWS][2];
    multiply(ROWS, w, PITCH, 1, panel, n, total);
    if (!integers) return add_tile(ROWS, sums, tokens, total);
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int half = 0; half < 2; half++) {
        int32_t *to = (int32_t *)sums + r * tokens + half * LANES;
        vi after = LOAD(vi, to) + __builtin_convertvector(total[r][half], vi);
        memcpy(to, &after, sizeof after);
    }
}

/* Rows of W from `row` on times all panels. */
static void stripe(const struct matrix *w, size_t row, const float *panels, size_t tokens, size_t stride, float *block,
                   float *sums) {
    size_t rows = w->out - row < STRIPE ? w->out - row : STRIPE;
    memset(sums, 0, STRIPE * tokens * sizeof *sums);
    for (size_t i = 0; i < (size_t)w->in; i += DEPTH) {
        size_t n = w->in - i < DEPTH ? w->in - i : DEPTH;
        for (size_t r = 0; r < rows; r++) unpack_row(w, row + r, i, n, block + r * PITCH);
        for (size_t t = 0; t < tokens; t += WIDTH)
            for (size_t r = 0; r < rows; r += ROWS)
                add_product(block + r * PITCH, panels + t * stride + i * WIDTH, up_to(n, STEP), sums + r * tokens + t,
                            tokens, w->w8a8);
    }
}

static void write_stripe(const struct matrix *w, size_t row, const float *sums, size_t pitch, const float *scales,
                         size_t first, size_t n, const struct rows *y) {
    size_t rows = w->out - row < STRIPE ? w->out - row : STRIPE;
    for (size_t t = 0; t < n; t++)
        for (size_t r = 0; r < rows; r += LANES) {
            size_t some = rows - r < LANES ? rows - r : LANES;
            float results[LANES] = {0};
            for (size_t j = 0; j < some; j++) {
                const float *at = sums + (r + j) * pitch + t;
                float total = w->w8a8 ? (float)LOAD(int32_t, at) : *at;
                results[j] = total * scales[t] * row_scale(w, row + r + j);
            }
            store(y->type, (char *)y->data + (first + t) * bytes_of(y->type, w->out), row + r, LOAD(vf, results), some);
        }
}

int many_rows_product(const struct matrix *w, const struct rows *x, const float *scales, const struct rows *y,
                      int threads) {
    size_t stride = up_to(w->in, STEP), most = up_to(x->tokens < TOKENS ? x->tokens : TOKENS, WIDTH);
    float *panels = aligned_alloc(64, up_to((stride + 1) * most * sizeof(float), 64));
    int failed = !panels;
#pragma omp parallel num_threads(threads)
    {
        struct operand row;
        float *block = aligned_alloc(64, STRIPE * PITCH * sizeof(float) + STRIPE * most * sizeof(float));
        if (!make_operand(w, 1, &row) || !block) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        for (int64_t first = 0; first < x->tokens && !failed; first += TOKENS) {
            size_t n = x->tokens - first < TOKENS ? x->tokens - first : TOKENS, tokens = up_to(n, WIDTH);
            float *panel_scales = panels + stride * most, *sums = block + STRIPE * PITCH;
#pragma omp for schedule(static)
            for (size_t t = 0; t < n; t += WIDTH)
                pack_panel(w, x, scales, first + t, n - t < WIDTH ? n - t : WIDTH, &row, panels + t * stride,
                           panel_scales + t);
#pragma omp for schedule(dynamic)
            for (int64_t r = 0; r < w->out; r += STRIPE) {
                stripe(w, r, panels, tokens, stride, block, sums);
                write_stripe(w, r, sums, tokens, panel_scales, first, n, y);
            }
        }
        free(block);
        free(row.memory);
    }
    free(panels);
    return !failed;
}
