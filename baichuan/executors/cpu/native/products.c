/* y = x @ Wᵀ for few tokens: W is read from memory once, as stored, and multiplied by all tokens.

   Weights and activations are converted to float32 in registers; sums are float32, and exact for SmoothQuant. */
#include "products.h"

#define ROWS 4 /* rows of W and TOKENS tokens of a tile whose sums fit the registers */
#if LANES == 8
#define TOKENS 2
#else
#define TOKENS 4
#endif
#define FEW_ROWS 16   /* must equal FEW_ROWS in native.py: for more tokens gemm.c is faster */
#define AHEAD    3072 /* bytes of prefetch distance */
#define CHUNK    64   /* steps whose scales are read at once */
_Static_assert(2 * CHUNK * 127 * 127 < 1 << 24, "a lane sums the integers of a chunk exactly");

/* The start of ROWS rows of W, or of its scales; after the last row the last one is repeated. */
INLINE void row_starts(const void *data, size_t bytes, size_t row, size_t rows, const char *starts[ROWS]) {
    for (size_t r = 0; r < ROWS; r++) starts[r] = (const char *)data + (row + r < rows ? row + r : rows - 1) * bytes;
}

/* INT4: the scales, or zeros, of n steps of a row, from step `first` on; `row` has one of type t per group, and the
   matrix's last one ends at `end`. */
INLINE void read_scales(const struct matrix *w, enum type t, const char *row, const char *end, size_t first, size_t n,
                        float scales[CHUNK]) {
    if (w->groups * STEP == w->in) { /* a group is a step; after the row's last group comes the next row's first */
        for (size_t i = 0; i < n; i += LANES) {
            int inside = row + bytes_of(t, first + i + LANES) <= end;
            vf v = inside ? load(t, row, first + i) : load_part(t, row, first + i, w->groups);
            memcpy(scales + i, &v, sizeof v);
        }
        return;
    }
    size_t steps = up_to(w->in / w->groups, STEP) / STEP, group = first / steps; /* steps per group */
    for (size_t i = 0, last; i < n; group++) {
        float scale = load_part(t, row, group, w->groups)[0];
        for (last = (group + 1) * steps - first; i < last && i < n; i++) scales[i] = scale;
    }
}

/* total[r][k] += W[row + r, i : i + STEP] * x[k, i : i + STEP], lane by lane. */
INLINE void add_step(enum type t, int rows, const char *const starts[ROWS], size_t i, size_t left, const float *scales,
                     const float *zeros, const float *x, size_t stride, int tokens, vf total[][TOKENS]) {
    vf a[TOKENS], b[TOKENS];
    UNROLL for (int k = 0; k < tokens; k++) {
        a[k] = LOAD(vf, x + k * stride + i);
        b[k] = LOAD(vf, x + k * stride + i + LANES);
    }
    UNROLL for (int r = 0; r < rows; r++) {
        vf v[2];
        if (left >= STEP) load_step(t, starts[r], i, v);
        else load_step_part(t, starts[r], i, left, v);
        if (zeros) v[0] -= zeros[r * CHUNK], v[1] -= zeros[r * CHUNK];
        if (t == INT4 && tokens > 1) v[0] *= scales[r * CHUNK], v[1] *= scales[r * CHUNK];
        UNROLL for (int k = 0; k < tokens; k++) {
            if (t == INT4 && tokens == 1) total[r][k] += (v[0] * a[k] + v[1] * b[k]) * scales[r * CHUNK];
            else {
                total[r][k] += v[0] * a[k];
                total[r][k] += v[1] * b[k];
            }
        }
    }
}

/* y[r][k] = W[row + r] · x[k].  One row at a time has ROWS sums, so that no step waits for the one before.

   Memory is read as one stream: the prefetches follow one another through this tile's successor. */
INLINE void tile(const struct matrix *w, enum type t, int w8a8, int zero, int rows, size_t row, const float *x,
                 size_t stride, int tokens, float y[ROWS][TOKENS]) {
    const char *starts[ROWS], *scale_rows[ROWS], *zero_rows[ROWS];
    row_starts(w->data, bytes_of(t, w->in), row, w->out, starts);
    row_starts(w->scale, bytes_of(w->scale_type, w->groups), row, w->out, scale_rows);
    row_starts(w->zero, w->groups, row, w->out, zero_rows);
    size_t steps = w->in / STEP, parts = ROWS / rows, tile_bytes = rows * bytes_of(t, w->in);
    const char *ahead = starts[0] + (rows == 1 ? AHEAD : up_to(AHEAD, tile_bytes));
    const char *scales_end = (const char *)w->scale + bytes_of(w->scale_type, w->out * w->groups);
    const char *zeros_end = (const char *)w->zero + w->out * w->groups;
    float scales[ROWS][CHUNK], zeros[ROWS][CHUNK];
    vf total[ROWS][TOKENS] = {0};
    vi exact[ROWS][TOKENS] = {0};
    for (size_t first = 0; first * STEP < (size_t)w->in; first += CHUNK) {
        size_t n = steps - first < CHUNK ? steps - first : CHUNK, i = first * STEP, left = w->in - i - n * STEP, s = 0;
        for (int r = 0; t == INT4 && r < rows; r++) {
            read_scales(w, w->scale_type, scale_rows[r], scales_end, first, n < CHUNK ? n + 1 : n, scales[r]);
            if (zero) read_scales(w, INT8, zero_rows[r], zeros_end, first, n < CHUNK ? n + 1 : n, zeros[r]);
        }
        for (; s + parts <= n; s += parts) {
            for (size_t byte = 0; byte < ROWS * bytes_of(t, STEP); byte += 64)
                __builtin_prefetch(ahead + rows * bytes_of(t, i + s * STEP) + byte);
            UNROLL for (size_t p = 0; p < parts; p++)
                add_step(t, rows, starts, i + (s + p) * STEP, STEP, scales[0] + s + p, zero ? zeros[0] + s + p : NULL,
                         x, stride, tokens, total + p);
        }
        for (; s < n || (s == n && n < CHUNK && left); s++)
            add_step(t, rows, starts, i + s * STEP, s < n ? STEP : left, scales[0] + s, zero ? zeros[0] + s : NULL, x,
                     stride, tokens, total);
        UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int k = 0; w8a8 && k < tokens; k++) {
            exact[r][k] += __builtin_convertvector(total[r][k], vi);
            total[r][k] = (vf){0};
        }
    }
    UNROLL for (int r = 1; r < ROWS && rows == 1; r++) UNROLL for (int k = 0; k < tokens; k++) {
        total[0][k] += total[r][k];
        exact[0][k] += exact[r][k];
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int k = 0; k < tokens; k++) y[r][k] =
        w8a8 ? (float)sum_integers(exact[r][k]) : sum(total[r][k]);
}

INLINE void typed_tile(const struct matrix *w, int rows, size_t row, const float *x, size_t stride, int tokens,
                       float y[ROWS][TOKENS]) {
    switch (w->type) {
    case F32: return tile(w, F32, 0, 0, rows, row, x, stride, tokens, y);
    case F16: return tile(w, F16, 0, 0, rows, row, x, stride, tokens, y);
    case BF16: return tile(w, BF16, 0, 0, rows, row, x, stride, tokens, y);
    case FP8: return tile(w, FP8, 0, 0, rows, row, x, stride, tokens, y);
    case INT4:
        if (w->zero) return tile(w, INT4, 0, 1, rows, row, x, stride, tokens, y);
        return tile(w, INT4, 0, 0, rows, row, x, stride, tokens, y);
    default:
        if (w->w8a8) return tile(w, INT8, 1, 0, rows, row, x, stride, tokens, y);
        return tile(w, INT8, 0, 0, rows, row, x, stride, tokens, y);
    }
}

/* ROWS rows of W times all tokens, scaled and rounded once. */
static void stripe(const struct matrix *w, size_t row, const struct operand *x, const struct rows *y) {
    size_t n = w->out - row < ROWS ? w->out - row : ROWS, tokens = y->tokens;
    for (size_t token = 0; token < tokens;) {
        const float *floats = x->floats + token * x->stride;
        size_t left = tokens - token, some = left >= TOKENS ? TOKENS : left >= 2 ? 2 : 1;
        float sums[ROWS][TOKENS];
        if (some == TOKENS) typed_tile(w, ROWS, row, floats, x->stride, TOKENS, sums);
        else if (some == 2) typed_tile(w, ROWS, row, floats, x->stride, 2, sums);
        else if (w->type == INT4) typed_tile(w, ROWS, row, floats, x->stride, 1, sums);
        else
            for (size_t r = 0; r < n; r++) typed_tile(w, 1, row + r, floats, x->stride, 1, sums + r);
        for (size_t k = 0; k < some; k++, token++) {
            float column[LANES > ROWS ? LANES : ROWS] = {0};
            for (size_t r = 0; r < n; r++) column[r] = sums[r][k] * operand_scale(w, x, token) * row_scale(w, row + r);
            store(y->type, (char *)y->data + token * bytes_of(y->type, w->out), row, LOAD(vf, column), n);
        }
    }
}

int few_rows_product(const struct matrix *w, const struct rows *x, const float *scales, const struct rows *y,
                     int threads) {
    struct operand operand;
    if (!make_operand(w, x->tokens, &operand)) return 0;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < x->tokens; token++) prepare_token(w, x, scales, &operand, token);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < w->out; row += ROWS) stripe(w, row, &operand, y);
    }
    free(operand.memory);
    return 1;
}

int product(const struct matrix *w, const struct rows *x, const float *scales, const struct rows *y, int threads) {
    if (batch_suits(w, x)) return batch_product(w, x, y, threads);
    return (x->tokens <= FEW_ROWS ? few_rows_product : many_rows_product)(w, x, scales, y, threads);
}
