/* y = x @ Wᵀ for a batch of a few tokens by 16-bit integers: a register holds two words of each of TOKENS tokens. */
#include "unpack.h"

#if LANES == 16 && HAS_INTEGERS

#define TOKENS     (LANES / 2)
#define BATCH_ROWS LANES

/* BATCH_ROWS rows of W unpacked as a whole, in the second-level cache: so they are read from memory as one stream. */
struct stripe {
    float *words, *scales;
    size_t pitch, scale_pitch; /* between rows */
};

/* sums[r] += row r times the panel, over one group of n channels from channel k on.
   ahead: `rate` bytes from here are fetched for each word, so that the next rows come meanwhile. */
INLINE void add_group(const char *ahead, size_t rate, const struct stripe *s, size_t k, size_t n, size_t group,
                      const float *panel, vf sums[BATCH_ROWS]) {
    vf total[BATCH_ROWS] = {0};
    for (size_t word = k / 2; word < (k + n) / 2; word += 2) {
        vf x = LOAD(vf, panel + word * TOKENS);
        __builtin_prefetch(ahead + word * rate);
        UNROLL for (int r = 0; r < BATCH_ROWS; r++) {
            int64_t two = LOAD(int64_t, s->words + r * s->pitch + word);
            total[r] = multiply_add(INTEGERS, total[r], (vf)_mm512_set1_epi64(two), x);
        }
    }
    UNROLL for (int r = 0; r < BATCH_ROWS; r++) sums[r] +=
        __builtin_convertvector((vi)total[r], vf) * s->scales[r * s->scale_pitch + k / group];
}

/* Exchanges row and column of 64-bit elements. */
INLINE void transpose(__m512i x[TOKENS]) {
    UNROLL for (int half = TOKENS / 2; half; half /= 2) {
        __m512i low = _mm512_setzero_si512(), high = low;
        UNROLL for (int i = 0; i < TOKENS; i++) {
            low = _mm512_mask_set1_epi64(low, 1 << i, i & half ? TOKENS + i - half : i);
            high = _mm512_mask_set1_epi64(high, 1 << i, i & half ? TOKENS + i : i + half);
        }
        UNROLL for (int i = 0; i < TOKENS; i++) {
            if (i & half) continue;
            __m512i a = x[i], b = x[i + half];
            x[i] = _mm512_permutex2var_epi64(a, low, b);
            x[i + half] = _mm512_permutex2var_epi64(a, high, b);
        }
    }
}

static void write_rows(const struct matrix *w, size_t row, const vf sums[BATCH_ROWS], const struct rows *y) {
    size_t n = w->out - row < BATCH_ROWS ? w->out - row : BATCH_ROWS;
    vf scale = w->type == INT8 ? load_part(F32, w->scale, row, w->out) : splat(1);
    __m512i pairs[TOKENS]; /* of rows, of each token */
    UNROLL for (int p = 0; p < TOKENS; p++) {
        __m512 a = (__m512)sums[2 * p], b = (__m512)sums[2 * p + 1];
        a = _mm512_add_ps(a, _mm512_permute_ps(a, 0xB1));
        b = _mm512_add_ps(b, _mm512_permute_ps(b, 0xB1));
        pairs[p] = (__m512i)_mm512_mask_blend_ps(0xAAAA, a, b);
    }
    transpose(pairs);
    for (size_t token = 0; token < (size_t)y->tokens; token++)
        store(y->type, (char *)y->data + token * bytes_of(y->type, w->out), row, (vf)pairs[token] * scale, n);
}

/* BATCH_ROWS rows of W times the panel. */
INLINE void multiply_stripe(const struct matrix *w, enum type t, int has_zeros, const struct plan *plan, size_t row,
                            const float *panel, const struct stripe *s, const struct rows *y) {
    vf sums[BATCH_ROWS] = {0};
    size_t in = w->in, last = w->out - 1, rate = BATCH_ROWS * bytes_of(t, 2);
    const char *ahead = (const char *)w->data + (row + BATCH_ROWS) * bytes_of(t, in);
    for (size_t r = 0; r < BATCH_ROWS; r++)
        unpack_integers(w, t, has_zeros, plan, row + r < last ? row + r : last, 0, in, s->words + r * s->pitch,
                        s->scales + r * s->scale_pitch);
    for (size_t i = 0; i < in; i += DEPTH) {
        vf part[BATCH_ROWS] = {0};
        for (size_t k = i; k < in && k < i + DEPTH; k += plan->group)
            add_group(ahead, rate, s, k, up_to(in - k < plan->group ? in - k : plan->group, STEP), plan->group, panel,
                      part);
        vf x_scales = LOAD(vf, panel + plan->words * TOKENS + i / DEPTH * LANES);
        UNROLL for (int r = 0; r < BATCH_ROWS; r++) sums[r] += part[r] * x_scales;
    }
    write_rows(w, row, sums, y);
}

static void typed_stripe(const struct matrix *w, const struct plan *plan, size_t row, const float *panel,
                         const struct stripe *s, const struct rows *y) {
    if (w->type == INT8) multiply_stripe(w, INT8, 0, plan, row, panel, s, y);
    else if (w->zero) multiply_stripe(w, INT4, 1, plan, row, panel, s, y);
    else multiply_stripe(w, INT4, 0, plan, row, panel, s, y);
}

/* x as [words / 2, TOKENS, 2], then the scales as [groups, TOKENS, 2]. */
static int pack_pairs(const struct matrix *w, const struct plan *plan, const struct rows *x, float *panel) {
    struct operand row;
    float ones[LANES], *once = aligned_alloc(64, plan->stride * LANES * sizeof *once);
    int done = make_operand(w, 1, &row) && once;
    if (done) {
        pack_panel(w, plan, x, NULL, 0, x->tokens, 1, &row, once, ones);
        for (size_t k = 0; k < plan->stride; k++) {
            int is_scale = k >= plan->words;
            float *to = is_scale ? panel + plan->words * TOKENS + (k - plan->words) * LANES : panel + k / 2 * LANES;
            for (size_t token = 0; token < TOKENS; token++) {
                to[2 * token + (is_scale ? 0 : k % 2)] = once[k * LANES + token];
                if (is_scale) to[2 * token + 1] = once[k * LANES + token];
            }
        }
    }
    free(row.memory);
    free(once);
    return done;
}

int batch_product(const struct matrix *w, const struct rows *x, const struct rows *y, int threads) {
    const struct plan plan = make_plan(w, x->type);
    float *panel = aligned_alloc(64, plan.stride * LANES * sizeof *panel);
    int failed = !panel || !pack_pairs(w, &plan, x, panel);
#pragma omp parallel num_threads(threads)
    {
        struct stripe s = {.pitch = plan.words + LANES, .scale_pitch = up_to(w->in / plan.group + 1, LANES)};
        s.words = aligned_alloc(64, BATCH_ROWS * (s.pitch + s.scale_pitch) * sizeof *s.words);
        s.scales = s.words + BATCH_ROWS * s.pitch;
        if (!s.words) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic, 8)
        for (int64_t row = 0; row < w->out; row += BATCH_ROWS)
            if (!failed) typed_stripe(w, &plan, row, panel, &s, y);
        free(s.words);
    }
    free(panel);
    return !failed;
}

int batch_suits(const struct matrix *w, const struct rows *x) {
    int some = x->tokens > 2 && x->tokens <= TOKENS;
    return some && (w->type == INT4 || w->type == INT8) && make_plan(w, x->type).kind == INTEGERS;
}

#else

int batch_product(const struct matrix *w, const struct rows *x, const struct rows *y, int threads) {
    return few_rows_product(w, x, NULL, y, threads);
}

int batch_suits(const struct matrix *w, const struct rows *x) { return !w && !x; }

#endif
