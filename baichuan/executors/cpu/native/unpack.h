/* Numbers as INTEGERS, with the scales of their groups.

   With its group's largest magnitude below 2^e, a number is round(number * 2^(bits - e)), so that it is exact where its
   digits end above 2^(e - bits) and else off by 2^(e - bits - 1) at most.  INT4 and INT8 weights are exact. */
#ifndef UNPACK_H
#define UNPACK_H
#include "tile.h"

/* 2^(bits - e) for numbers of the largest magnitude whose bits are given, below 2^e; its inverse in *scale, which is
   not a number if one of them is infinite or none. */
INLINE float power_for(vi largest, int bits, float *scale) {
    int32_t e = largest_integer(largest) >> 23;
    if (e < 20) e = 20; /* the smallest numbers become 0 */
    uint32_t power = (uint32_t)(253 + bits - e) << 23, inverse = (uint32_t)(e + 1 - bits) << 23;
    if (e == 255) power = 0, inverse = 0x7FC00000;
    memcpy(scale, &inverse, sizeof inverse);
    return LOAD(float, &power);
}

INLINE vi larger_magnitude(vi largest, vf x) {
    vi magnitude = (vi)absolute(x), pick = magnitude > largest;
    return (magnitude & pick) | (largest & ~pick);
}

/* INT4: of channel i. */
INLINE float scale_of(const struct matrix *w, size_t row, size_t i) {
    const char *scales = (const char *)w->scale + row * bytes_of(w->scale_type, w->groups);
    return load_part(w->scale_type, scales, i / (w->in / w->groups), w->groups)[0];
}

INLINE int zero_of(const struct matrix *w, size_t row, size_t i) {
    return w->zero ? w->zero[row * w->groups + i / (w->in / w->groups)] : 0;
}

/* Of each group of channels i to i + n, i a multiple of DEPTH; INT8's rows are scaled at the end.
   scales: room for a multiple of LANES. */
INLINE void group_scales(const struct matrix *w, enum type t, const struct plan *plan, size_t row, size_t i, size_t n,
                         float *scales) {
    size_t group = plan->group;
    if (t == INT4 && plan->own_groups) {
        size_t first = row * w->groups + i / DEPTH * plan->block_groups, all = w->out * w->groups;
        for (size_t g = 0; g * group < n; g += LANES) {
            vf found = first + g + LANES <= all ? load(w->scale_type, w->scale, first + g)
                                                : load_part(w->scale_type, w->scale, first + g, all);
            memcpy(scales + g, &found, sizeof found);
        }
        return;
    }
    for (size_t k = 0; k < n; k += group) scales[k / group] = t == INT4 ? scale_of(w, row, i + k) : 1;
}

/* STEP channels of an INT4 or INT8 row from i on as words, in load_step's order; zeros after `left` of them. */
INLINE vi load_words(enum type t, const char *row, size_t i, size_t left) {
    const char *p = row + bytes_of(t, i);
    char part[STEP] = {0};
    if (left < STEP) p = memcpy(part, p, bytes_of(t, left));
#if LANES == 16
    if (t == INT8) return (vi)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)p));
    __m512i twice = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)p)));
    const __m512i up = _mm512_inserti64x4(_mm512_set1_epi16(8), _mm256_set1_epi16(12), 0);
    return (vi)_mm512_srai_epi16(_mm512_sllv_epi16(twice, up), 12);
#else
    vf step[2];
    halves words[2];
    load_step(t, p, 0, step);
    for (int j = 0; j < 2; j++) words[j] = low_halves((vu) __builtin_convertvector(step[j], vi));
    return LOAD(vi, words);
#endif
}

/* Words less a zero point. */
INLINE vi less_zero(vi words, int zero) {
    halves numbers[2];
    memcpy(numbers, &words, sizeof words);
    for (int j = 0; j < 2; j++) numbers[j] -= (uint16_t)zero;
    return LOAD(vi, numbers);
}

/* Channels i to i + n of an INT4 or INT8 row as INTEGERS. */
INLINE void unpack_integers(const struct matrix *w, enum type t, int has_zeros, const struct plan *plan, size_t row,
                            size_t i, size_t n, float *words, float *scales) {
    const char *data = (const char *)w->data + row * bytes_of(t, w->in);
    vi step;
    size_t k = 0;
    group_scales(w, t, plan, row, i, n, scales);
    for (; k + STEP <= n; k += STEP) {
        step = load_words(t, data, i + k, STEP);
        if (has_zeros) step = less_zero(step, zero_of(w, row, i + k));
        memcpy(words + k / 2, &step, sizeof step);
    }
    if (k < n) {
        step = load_words(t, data, i + k, n - k);
        if (has_zeros) step = less_zero(step, zero_of(w, row, i + k));
        memcpy(words + k / 2, &step, sizeof step);
    }
}

#endif
