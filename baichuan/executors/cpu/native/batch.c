/* y = x @ Wᵀ for a batch of tokens by exact products of bytes.

   An activation is a 16-bit integer (unpack.h), x = 256 h + l with h in [-128, 127] and l in [0, 255].  Processors
   multiply bytes without a sign by bytes with one.  An INT4 weight s, less its zero, becomes u = s + bias, which is both:
   sum(s x) = 256 sum(u h) + sum(l u) - bias sum(x).  INT8 weights s and u = s + 128 give
   sum(s x) = 256 sum(u h) + sum(l s) - 256 sum(128 h). */
#include "unpack.h"

#if LANES == 16 && HAS_INTEGERS

#define TOKENS     8 /* tokens of a panel: a register holds EIGHT channels of each */
#define EIGHT      8
#define PANELS     2
#define TILE       8 /* rows of W whose sums fit the registers */
#define BATCH_ROWS (2 * TILE)
#define BLOCK      128 /* INT4 channels that are unpacked at once: the even ones before the odd ones */

/* BATCH_ROWS rows of W unpacked as a whole, in a cache: so they are read from memory as one stream. */
struct stripe {
    char *bytes;
    float *scales;
    size_t pitch, scale_pitch; /* between rows */
};

/* Up to TOKENS tokens. */
struct panel {
    char *bytes;     /* [channels / EIGHT, 2, TOKENS, EIGHT]: h of each, then l */
    vi *offsets;     /* [groups of W] of [TOKENS, 2]: less what is subtracted above, of each half of the channels */
    vf *scales;      /* [channels / DEPTH] of [TOKENS, 2]: each twice */
    size_t channels; /* a multiple of DEPTH, zeros after the last */
};

/* What makes an INT4 weight, of -8 to 7 less a zero of -16 to 16, a number without a sign. */
INLINE int bias_of(const struct matrix *w) { return w->zero ? 24 : 8; }

/* total += the sums of four products u * s each */
INLINE vi byte_dot(vi total, vi u, vi s) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(u), "v"(s));
    return total;
}

INLINE vi add_128(vi bytes) {
    vi sum;
    __asm__("vpxord %2, %1, %0" : "=v"(sum) : "v"(bytes), "v"(_mm512_set1_epi8(-128)));
    return sum;
}

/* Where a stripe's row has EIGHT number c of the STEP channels from channel i on, which are in load_step's order. */
INLINE size_t place(enum type t, size_t i, size_t c) {
    return t == INT4 ? i / BLOCK * BLOCK + i % BLOCK / 2 + c % 2 * EIGHT + c / 2 * (BLOCK / 2) : i + c * EIGHT;
}

/* parts[r] += row r of a tile times the panel, over one group of n channels from channel k on.
   ahead: `rate` bytes from here are fetched for each EIGHT channels, so that the next rows come meanwhile. */
INLINE void add_group(enum type t, const char *ahead, size_t rate, const char *bytes, size_t pitch, const float *scales,
                      size_t scale_pitch, size_t k, size_t n, const struct panel *panel, vi offset, vf parts[TILE]) {
    vi high[TILE] = {0}, low[TILE];
    UNROLL for (int r = 0; r < TILE; r++) low[r] = offset;
    for (size_t i = k; i < k + n; i += STEP)
        UNROLL for (size_t c = 0; c < STEP / EIGHT; c++) {
            const char *x = panel->bytes + (2 * i + 2 * c * EIGHT) * TOKENS;
            vi h = LOAD(vi, x), l = LOAD(vi, x + EIGHT * TOKENS);
            __builtin_prefetch(ahead + (i / EIGHT + c) * rate);
            UNROLL for (int r = 0; r < TILE; r++) {
                vi s = (vi)_mm512_set1_epi64(LOAD(int64_t, bytes + r * pitch + place(t, i, c)));
                high[r] = byte_dot(high[r], t == INT8 ? add_128(s) : s, h);
                low[r] = byte_dot(low[r], l, s);
            }
        }
    UNROLL for (int r = 0; r < TILE; r++) parts[r] +=
        __builtin_convertvector((high[r] << 8) + low[r], vf) * scales[r * scale_pitch];
}

/* bias_of less the zeros of BLOCK channels from i on, a byte for each pair. */
INLINE __m512i block_bias(const struct matrix *w, size_t row, size_t i) {
    int32_t zeros[BLOCK / STEP] = {0};
    for (size_t c = 0; c < BLOCK / STEP && i + c * STEP < (size_t)w->in; c++)
        zeros[c] = bias_of(w) - 8 - zero_of(w, row, i + c * STEP);
    const __m512i lanes = _mm512_set_epi64(12, 12, 8, 8, 4, 4, 0, 0), first = _mm512_setzero_si512();
    __m512i wide = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)zeros));
    return _mm512_shuffle_epi8(wide, _mm512_shuffle_epi8(lanes, first));
}

/* An INT4 row as bytes: nibble ^ 8 = s + 8. */
INLINE void unpack_nibbles(const struct matrix *w, int has_zeros, size_t row, char *to) {
    const char *data = (const char *)w->data + row * w->in / 2;
    const __m512i nibble = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(8);
    for (size_t i = 0, in = w->in; i < in; i += BLOCK) {
        __mmask64 there = in - i < BLOCK ? (1ULL << (in - i) / 2) - 1 : -1ULL;
        __m512i pairs = _mm512_maskz_loadu_epi8(there, data + i / 2), odds = _mm512_srli_epi16(pairs, 4);
        __m512i even = _mm512_ternarylogic_epi32(pairs, nibble, sign, 0x6A); /* (a & b) ^ c */
        __m512i odd = _mm512_ternarylogic_epi32(odds, nibble, sign, 0x6A);
        if (has_zeros) {
            __m512i bias = block_bias(w, row, i);
            even = _mm512_add_epi8(even, bias), odd = _mm512_add_epi8(odd, bias);
        }
        _mm512_storeu_si512(to + i, even);
        _mm512_storeu_si512(to + i + BLOCK / 2, odd);
    }
}

/* A row of W as row r of the stripe. */
INLINE void unpack_whole(const struct matrix *w, enum type t, int has_zeros, const struct plan *plan, size_t row,
                         const struct stripe *to, size_t r) {
    char *bytes = to->bytes + r * to->pitch;
    group_scales(w, t, plan, row, 0, w->in, to->scales + r * to->scale_pitch);
    if (t == INT8) memcpy(bytes, (const char *)w->data + row * w->in, w->in);
    else unpack_nibbles(w, has_zeros, row, bytes);
}

/* From each of two registers, the elements of 64 bits whose number has the bit `half`, or has it not. */
INLINE void exchange(__m512i *a, __m512i *b, int half) {
    typedef int64_t eight __attribute__((vector_size(64)));
    const eight number = {0, 1, 2, 3, 4, 5, 6, 7}, own = number & ~(int64_t)half, other = (number & half) * (8 / half);
    __m512i first = _mm512_permutex2var_epi64(*a, (__m512i)(own + other), *b);
    *b = _mm512_permutex2var_epi64(*a, (__m512i)((own | half) + other), *b);
    *a = first;
}

/* Exchanges row and column of 64-bit elements. */
INLINE void transpose(__m512i x[TOKENS]) {
    UNROLL for (int i = 0; i < 4; i++) exchange(x + i, x + i + 4, 4);
    UNROLL for (int i = 0; i < 4; i++) exchange(x + i + i / 2 * 2, x + i + i / 2 * 2 + 2, 2);
    UNROLL for (int i = 0; i < 4; i++) exchange(x + 2 * i, x + 2 * i + 1, 1);
}

/* To y, from token `first` on. */
static void write_rows(const struct matrix *w, size_t row, const vf sums[BATCH_ROWS], size_t first, size_t tokens,
                       const struct rows *y) {
    size_t n = w->out - row < BATCH_ROWS ? w->out - row : BATCH_ROWS;
    vf scale = w->type == INT8 ? load_part(F32, w->scale, row, w->out) : splat(1);
    __m512i pairs[TOKENS]; /* [p]: the sums of rows 2 p and 2 p + 1, side by side for each token */
    UNROLL for (int p = 0; p < TOKENS; p++) {
        __m512 a = (__m512)sums[2 * p], b = (__m512)sums[2 * p + 1];
        a = _mm512_add_ps(a, _mm512_permute_ps(a, 0xB1));
        b = _mm512_add_ps(b, _mm512_permute_ps(b, 0xB1));
        pairs[p] = (__m512i)_mm512_mask_blend_ps(0xAAAA, a, b);
    }
    transpose(pairs);
    for (size_t token = 0; token < tokens; token++)
        store(y->type, (char *)y->data + (first + token) * bytes_of(y->type, w->out), row, (vf)pairs[token] * scale, n);
}

/* sums = the rows of a stripe times a panel; for `rate` see add_group. */
INLINE void multiply_stripe(const struct matrix *w, enum type t, const struct plan *plan, const char *ahead,
                            size_t rate, const struct stripe *s, const struct panel *panel, vf sums[BATCH_ROWS]) {
    size_t in = w->in, group = plan->group;
    for (size_t r = 0; r < BATCH_ROWS; r += TILE, ahead += in / EIGHT * rate) {
        UNROLL for (int a = 0; a < TILE; a++) sums[r + a] = (vf){0};
        for (size_t i = 0; i < in; i += DEPTH) {
            vf parts[TILE] = {0};
            for (size_t k = i; k < in && k < i + DEPTH; k += group)
                add_group(t, ahead, rate, s->bytes + r * s->pitch, s->pitch, s->scales + r * s->scale_pitch + k / group,
                          s->scale_pitch, k, up_to(in - k < group ? in - k : group, STEP), panel,
                          panel->offsets[k / group], parts);
            UNROLL for (int a = 0; a < TILE; a++) sums[r + a] += parts[a] * panel->scales[i / DEPTH];
        }
    }
}

/* BATCH_ROWS rows of W times all panels. */
INLINE void stripe(const struct matrix *w, enum type t, int has_zeros, const struct plan *plan, size_t row,
                   const struct panel panels[PANELS], const struct stripe *s, const struct rows *y) {
    size_t last = w->out - 1, rate = TILE * bytes_of(t, EIGHT), tokens = y->tokens;
    const char *ahead = (const char *)w->data + (row + BATCH_ROWS) * bytes_of(t, w->in);
    const char *scales = (const char *)w->scale + (row + BATCH_ROWS) * bytes_of(w->scale_type, w->groups);
    for (size_t byte = 0; t == INT4 && byte < bytes_of(w->scale_type, BATCH_ROWS * w->groups); byte += 64)
        __builtin_prefetch(scales + byte);
    for (size_t r = 0; r < BATCH_ROWS; r++)
        unpack_whole(w, t, has_zeros, plan, row + r < last ? row + r : last, s, r);
    for (size_t first = 0; first < tokens; first += TOKENS) {
        vf sums[BATCH_ROWS];
        multiply_stripe(w, t, plan, ahead, first ? 0 : rate, s, panels + first / TOKENS, sums);
        write_rows(w, row, sums, first, tokens - first < TOKENS ? tokens - first : TOKENS, y);
    }
}

static void typed_stripe(const struct matrix *w, const struct plan *plan, size_t row,
                         const struct panel panels[PANELS], const struct stripe *s, const struct rows *y) {
    if (w->type == INT8) stripe(w, INT8, 0, plan, row, panels, s, y);
    else if (w->zero) stripe(w, INT4, 1, plan, row, panels, s, y);
    else stripe(w, INT4, 0, plan, row, panels, s, y);
}

/* STEP 16-bit integers as h and l of one token, in load_step's order.  to: of the panel, at the first EIGHT. */
INLINE void store_bytes(enum type t, __m512i x, char *to) {
    __m256i h = _mm512_cvtepi16_epi8(_mm512_srli_epi16(x, 8)), l = _mm512_cvtepi16_epi8(x);
    if (t == INT4) { /* the even channels before the odd ones */
        h = _mm256_set_m128i(_mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 24)),
                             _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 8)));
        l = _mm256_set_m128i(_mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 16)), _mm512_cvtepi32_epi8(x));
    }
    int64_t eights[2][STEP / EIGHT];
    memcpy(eights[0], &h, sizeof h);
    memcpy(eights[1], &l, sizeof l);
    for (size_t c = 0; c < STEP / EIGHT; c++)
        for (size_t half = 0; half < 2; half++)
            memcpy(to + (2 * c + half) * TOKENS * EIGHT, &eights[half][c], EIGHT);
}

/* Channels i to i + DEPTH of tokens first to first + n. */
static void pack_channels(const struct matrix *w, const struct plan *plan, const struct rows *x, size_t first, size_t n,
                          size_t i, struct panel *to) {
    size_t in = w->in, end = in - i < DEPTH ? in : i + DEPTH;
    float scales[2 * TOKENS] = {0};
    memset(to->bytes + 2 * i * TOKENS, 0, 2 * DEPTH * TOKENS);
    for (size_t token = 0; token < n; token++) {
        const char *row = (const char *)x->data + (first + token) * bytes_of(x->type, in);
        vi largest = {0};
        for (size_t k = i; k < end; k += LANES) largest = larger_magnitude(largest, load_part(x->type, row, k, in));
        float power = power_for(largest, plan->bits, scales + 2 * token);
        scales[2 * token + 1] = scales[2 * token];
        for (size_t k = i; k < end; k += STEP) {
            vf step[2] = {load_part(x->type, row, k, in), (vf){0}};
            if (k + LANES < in) step[1] = load_part(x->type, row, k + LANES, in);
            __m512i a = _mm512_cvtps_epi32((__m512)(step[0] * power));
            __m512i b = _mm512_cvtps_epi32((__m512)(step[1] * power));
            __m512i both = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(a));
            both = _mm512_inserti64x4(both, _mm512_cvtepi32_epi16(b), 1);
            store_bytes(w->type, both, to->bytes + (2 * k + token) * TOKENS);
        }
    }
    to->scales[i / DEPTH] = LOAD(vf, scales);
    const vi bias = (vi)_mm512_set1_epi8(w->type == INT4 ? bias_of(w) : -128);
    for (size_t k = i; k < end; k += plan->group) {
        vi high = {0}, low = {0};
        for (size_t c = k; c < k + plan->group; c += EIGHT) {
            const char *h = to->bytes + 2 * c * TOKENS, *l = h + EIGHT * TOKENS;
            high = byte_dot(high, bias, LOAD(vi, h));
            if (w->type == INT4) low = byte_dot(low, LOAD(vi, l), bias);
        }
        to->offsets[k / plan->group] = -(high << 8) - low;
    }
}

static int make_panel(const struct matrix *w, const struct plan *plan, struct panel *to) {
    to->channels = up_to(w->in, DEPTH);
    size_t groups = to->channels / plan->group, bytes = 2 * to->channels * TOKENS;
    to->bytes = aligned_alloc(64, bytes + (groups + to->channels / DEPTH) * sizeof(vi));
    to->offsets = (vi *)(to->bytes + bytes);
    to->scales = (vf *)(to->offsets + groups);
    return to->bytes != NULL;
}

static int make_stripe(const struct matrix *w, const struct plan *plan, struct stripe *to) {
    to->pitch = up_to(w->in, BLOCK) + BLOCK; /* so that rows do not map to the same cache sets */
    to->scale_pitch = up_to(w->in / plan->group + 1, LANES);
    to->bytes = aligned_alloc(64, BATCH_ROWS * (to->pitch + to->scale_pitch * sizeof(float)));
    to->scales = (float *)(to->bytes + BATCH_ROWS * to->pitch);
    return to->bytes != NULL;
}

int batch_product(const struct matrix *w, const struct rows *x, const struct rows *y, int threads) {
    const struct plan plan = make_plan(w, x->type);
    struct panel panels[PANELS];
    int failed = 0;
    for (size_t p = 0; p < PANELS; p++) failed |= !make_panel(w, &plan, panels + p);
#pragma omp parallel num_threads(threads)
    {
        struct stripe s;
        if (!make_stripe(w, &plan, &s)) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for collapse(2) schedule(static)
        for (int64_t first = 0; first < x->tokens; first += TOKENS)
            for (int64_t i = 0; i < w->in; i += DEPTH) {
                size_t n = x->tokens - first < TOKENS ? x->tokens - first : TOKENS;
                if (!failed) pack_channels(w, &plan, x, first, n, i, panels + first / TOKENS);
            }
#pragma omp for schedule(dynamic, 8)
        for (int64_t row = 0; row < w->out; row += BATCH_ROWS)
            if (!failed) typed_stripe(w, &plan, row, panels, &s, y);
        free(s.bytes);
    }
    for (size_t p = 0; p < PANELS; p++) free(panels[p].bytes);
    return !failed;
}

int batch_suits(const struct matrix *w, const struct rows *x) {
    int some = x->tokens > 2 && x->tokens <= PANELS * TOKENS;
    return some && (w->type == INT4 || w->type == INT8) && make_plan(w, x->type).kind == INTEGERS;
}

#else

int batch_product(const struct matrix *w, const struct rows *x, const struct rows *y, int threads) {
    return few_rows_product(w, x, NULL, y, threads);
}

int batch_suits(const struct matrix *w, const struct rows *x) { return !w && !x; }

#endif
