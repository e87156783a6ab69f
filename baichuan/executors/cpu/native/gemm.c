/* y = x @ Wᵀ for many tokens: W is unpacked in blocks that stay in the cache, each block once. */
#include "tile.h"

#define TOKENS 512 /* tokens of one pass over W */

/* sums[ROWS][pitch] += rows r to r + ROWS of the block times n channels of a panel from channel k of the block on. */
INLINE void add_product(enum arithmetic kind, int registers, const struct matrix *w, const struct plan *plan,
                        const struct block *block, size_t r, size_t i, size_t k, size_t n, const float *panel,
                        float *sums, size_t pitch) {
    size_t width = registers * LANES;
    vf total[ROWS][2];
    multiply(kind, ROWS, registers, block->words + r * PITCH + words_of(kind, k), PITCH, 1,
             panel + words_of(kind, i + k) * width, words_of(kind, up_to(n, STEP)), total);
    if (kind == INTEGERS) {
        const float *x_scales = panel + (plan->words + (i + k) / plan->x_group) * width;
        UNROLL for (int a = 0; a < ROWS; a++) UNROLL for (int j = 0; j < registers; j++) {
            vf scaled = __builtin_convertvector((vi)total[a][j], vf) * LOAD(vf, x_scales + j * LANES);
            total[a][j] = scaled * block->scales[r + a][k / plan->group];
        }
    }
    if (!w->w8a8) return add_tile(ROWS, registers, sums, pitch, total);
    UNROLL for (int a = 0; a < ROWS; a++) UNROLL for (int j = 0; j < registers; j++) {
        int32_t *to = (int32_t *)sums + a * pitch + j * LANES;
        vi after = LOAD(vi, to) + __builtin_convertvector(total[a][j], vi);
        memcpy(to, &after, sizeof after);
    }
}

/* Rows of the block times n channels of a panel from channel i on. */
INLINE void add_block(enum arithmetic kind, int registers, const struct matrix *w, const struct plan *plan,
                      const struct block *block, size_t rows, size_t i, size_t n, const float *panel, float *sums,
                      size_t pitch) {
    size_t group = kind == INTEGERS ? plan->group : DEPTH;
    for (size_t r = 0; r < rows; r += ROWS)
        for (size_t k = 0; k < n; k += group)
            add_product(kind, registers, w, plan, block, r, i, k, n - k < group ? n - k : group, panel,
                        sums + r * pitch, pitch);
}

INLINE void typed_stripe(enum arithmetic kind, const struct matrix *w, const struct plan *plan, size_t row,
                         const float *panels, size_t tokens, struct block *block, float *sums, size_t pitch) {
    size_t rows = w->out - row < STRIPE ? w->out - row : STRIPE;
    memset(sums, 0, STRIPE * pitch * sizeof *sums);
    for (size_t i = 0; i < (size_t)w->in; i += DEPTH) {
        size_t n = w->in - i < DEPTH ? w->in - i : DEPTH;
        for (size_t r = 0; r < rows; r++) unpack_row(w, plan, row + r, i, n, block, r);
        for (size_t t = 0; t < tokens; t += WIDTH) {
            const float *panel = panels + t * plan->stride;
            if (tokens - t > LANES) add_block(kind, 2, w, plan, block, rows, i, n, panel, sums + t, pitch);
            else add_block(kind, 1, w, plan, block, rows, i, n, panel, sums + t, pitch);
        }
    }
}

/* Rows of W from `row` on times all panels. */
static void stripe(const struct matrix *w, const struct plan *plan, size_t row, const float *panels, size_t tokens,
                   struct block *block, float *sums, size_t pitch) {
    switch (plan->kind) {
    case FLOATS: return typed_stripe(FLOATS, w, plan, row, panels, tokens, block, sums, pitch);
    case INTEGERS: return typed_stripe(INTEGERS, w, plan, row, panels, tokens, block, sums, pitch);
    case BFLOATS: return typed_stripe(BFLOATS, w, plan, row, panels, tokens, block, sums, pitch);
    }
}

/* Sums of up to LANES rows and LANES tokens, scaled and rounded once, to tokens `first` to first + n of y. */
INLINE void write_square(const struct matrix *w, size_t row, size_t rows, const float *sums, size_t pitch,
                         const float *scales, size_t first, size_t n, const struct rows *y) {
    float square[LANES][LANES];
    for (size_t j = 0; j < LANES; j++)
        UNROLL for (size_t t = 0; t < LANES; t++) square[t][j] = j < rows ? sums[j * pitch + t] : 0;
    vf row_scales = splat(1);
    if (w->scale && w->type != INT4) row_scales = load_part(F32, w->scale, row, w->out);
    for (size_t t = 0; t < n; t++) {
        vf total = LOAD(vf, square[t]);
        if (w->w8a8) total = __builtin_convertvector((vi)total, vf);
        store(y->type, (char *)y->data + (first + t) * bytes_of(y->type, w->out), row, total * scales[t] * row_scales,
              rows);
    }
}

static void write_stripe(const struct matrix *w, size_t row, const float *sums, size_t pitch, const float *scales,
                         size_t first, size_t n, const struct rows *y) {
    size_t end = w->out - row < STRIPE ? (size_t)w->out : row + STRIPE;
    for (; row < end; row += LANES, sums += LANES * pitch)
        for (size_t t = 0; t < n; t += LANES)
            write_square(w, row, end - row < LANES ? end - row : LANES, sums + t, pitch, scales + t, first + t,
                         n - t < LANES ? n - t : LANES, y);
}

int many_rows_product(const struct matrix *w, const struct rows *x, const float *scales, const struct rows *y,
                      int threads) {
    const struct plan plan = make_plan(w, x->type);
    size_t most = up_to(x->tokens < TOKENS ? x->tokens : TOKENS, WIDTH);
    float *panels = aligned_alloc(64, up_to((plan.stride + 1) * most * sizeof(float), 64));
    int failed = !panels;
#pragma omp parallel num_threads(threads)
    {
        struct operand row;
        struct block *block = aligned_alloc(64, up_to(sizeof *block + STRIPE * (most + LANES) * sizeof(float), 64));
        if (!make_operand(w, 1, &row) || !block) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        for (int64_t first = 0; first < x->tokens && !failed; first += TOKENS) {
            size_t n = x->tokens - first < TOKENS ? x->tokens - first : TOKENS, pitch = up_to(n, WIDTH) + LANES;
            float *panel_scales = panels + plan.stride * most, *sums = (float *)(block + 1);
#pragma omp for schedule(static)
            for (size_t t = 0; t < n; t += WIDTH)
                pack_panel(w, &plan, x, scales, first + t, n - t < WIDTH ? n - t : WIDTH, n - t > LANES ? 2 : 1, &row,
                           panels + t * plan.stride, panel_scales + t);
#pragma omp for schedule(dynamic, 2)
            for (int64_t r = 0; r < w->out; r += STRIPE) {
                stripe(w, &plan, r, panels, n, block, sums, pitch);
                write_stripe(w, r, sums, pitch, panel_scales, first, n, y);
            }
        }
        free(block);
        free(row.memory);
    }
    free(panels);
    return !failed;
}
