/* One register of floats, loads of every stored type, and the few instructions that C has no operator for.

   All else uses the compiler's vector types: LANES floats per register on AVX-512, AVX2 or NEON. */
#ifndef VECTOR_H
#define VECTOR_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define LANES 8
#elif defined(__aarch64__)
#include <arm_neon.h>
#define LANES 4
#else
#error "needs AVX-512, AVX2 with FMA and F16C, or NEON"
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16") /* so that arrays are kept in registers */
#define STEP   (2 * LANES)              /* channels per iteration of a product */

enum type { F32, F16, BF16, FP8, INT8, INT4 }; /* must equal TYPES in native.py */

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

#define LOAD(T, p)                                                                                                     \
    ({                                                                                                                 \
        T loaded_;                                                                                                     \
        memcpy(&loaded_, (p), sizeof(T));                                                                              \
        loaded_;                                                                                                       \
    })

INLINE size_t bytes_of(enum type t, size_t elements) {
    return t == F32 ? 4 * elements : t == F16 || t == BF16 ? 2 * elements : t == INT4 ? elements / 2 : elements;
}

INLINE size_t up_to(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf load_f16(const void *p) {
#if LANES == 16
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(p));
#elif LANES == 8
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(p));
#else
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#endif
}

/* An e4m3 number shifted into the bits of a half is 2^8 times too small: value = half * 256. */
INLINE vf load_fp8(const void *p) {
#if LANES == 16
    __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(p));
#elif LANES == 8
    __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(p));
#else
    int16x4_t wide = vget_low_s16(vmovl_s8(vcreate_s8(LOAD(uint32_t, p))));
#endif
    halves h = ((halves)wide << 7) & 0xBFFF;
    return load_f16(&h) * 256.0f;
}

/* LANES signed bytes. */
INLINE vi widen_bytes(const void *p) {
#if LANES == 16
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(p));
#elif LANES == 8
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(p));
#else
    return (vi)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(LOAD(uint32_t, p)))));
#endif
}

/* LANES elements of a row from element i on. */
INLINE vf load(enum type t, const void *row, size_t i) {
    const char *p = (const char *)row + bytes_of(t, i);
    switch (t) {
    case F32: return LOAD(vf, p);
    case F16: return load_f16(p);
    case BF16: return (vf)(__builtin_convertvector(LOAD(halves, p), vu) << 16);
    case INT8: return __builtin_convertvector(widen_bytes(p), vf);
    default: return load_fp8(p);
    }
}

/* LANES elements of a row of n from element i on, zeros after the last. */
INLINE vf load_part(enum type t, const void *row, size_t i, size_t n) {
    if (i + LANES <= n) return load(t, row, i);
    char p[4 * LANES] = {0};
    memcpy(p, (const char *)row + bytes_of(t, i), bytes_of(t, n - i));
    return load(t, p, 0);
}

INLINE vf larger(vf a, vf b) {
    vi pick = a > b;
    return (vf)(((vi)a & pick) | ((vi)b & ~pick));
}

INLINE float largest(vf x) {
    float found = x[0];
    for (int i = 1; i < LANES; i++) found = x[i] > found ? x[i] : found;
    return found;
}

INLINE vf clamp(vf x, float limit) { return -larger(-larger(x, splat(-limit)), splat(-limit)); }

INLINE vf absolute(vf x) { return (vf)((vu)x & 0x7FFFFFFF); }

/* Rounded to the nearest integer, ties to even, for |x| < 2^22. */
INLINE vf nearest(vf x) { return (x + 12582912.0f) - 12582912.0f; }

/* To the nearest number of e4m3 (3 bits after the leading one, steps of 2^-9 below 2^-6), for |x| <= 448. */
INLINE vf to_e4m3(vf x) {
    vu bits = (vu)x;
    vf normal = (vf)((bits + 0x7FFFF + (bits >> 20 & 1)) & 0xFFF00000);
    vf small = (x + 24576.0f) - 24576.0f; /* 1.5 * 2^(23 - 9) */
    vi is_small = absolute(x) < 0.015625f;
    return (vf)(((vi)small & is_small) | ((vi)normal & ~is_small));
}

INLINE vu half_bits(vf x) {
#if LANES == 16
    return (vu)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)x, 0));
#elif LANES == 8
    return (vu)_mm256_cvtepu16_epi32(_mm256_cvtps_ph((__m256)x, 0));
#else
    return (vu)vmovl_u16(vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#endif
}

/* LANES floats rounded to nearest even: the type's bits at the low end of each lane.  INT8, FP8: x in range. */
INLINE vu encode(enum type t, vf x) {
    vu bits = (vu)x;
    switch (t) {
    case F16: return half_bits(x);
    case BF16: {
        vu rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
        vu number = (vu)((bits & 0x7FFFFFFF) <= 0x7F800000);
        return (rounded & number) | (quiet & ~number);
    }
    case INT8: return (vu) __builtin_convertvector(nearest(x), vi);
    case FP8: {
        vu half = half_bits(to_e4m3(x) / 256.0f);
        return (half >> 8 & 0x80) | (half >> 7 & 0x7F);
    }
    default: return bits;
    }
}

/* The low 16 bits of each lane. */
INLINE halves low_halves(vu x) {
#if LANES == 16
    return (halves)_mm512_cvtepi32_epi16((__m512i)x);
#else
    return __builtin_convertvector(x, halves);
#endif
}

/* The low 8 bits of each lane. */
INLINE bytes low_bytes(vu x) {
#if LANES == 16
    return (bytes)_mm512_cvtepi32_epi8((__m512i)x);
#else
    return __builtin_convertvector(x, bytes);
#endif
}

/* n <= LANES floats to row[i...]. */
INLINE void store(enum type t, void *row, size_t i, vf x, size_t n) {
    vu bits = encode(t, x);
    char part[4 * LANES], *to = (char *)row + bytes_of(t, i), *at = n == LANES ? to : part;
    if (t == F32) memcpy(at, &bits, sizeof bits);
    else if (t == F16 || t == BF16) {
        halves two = low_halves(bits);
        memcpy(at, &two, sizeof two);
    } else {
        bytes one = low_bytes(bits);
        memcpy(at, &one, sizeof one);
    }
    if (n < LANES) memcpy(to, part, bytes_of(t, n));
}

/* x rounded to the type. */
INLINE vf rounded(enum type t, vf x) {
    if (t == F32) return x;
    halves narrow = low_halves(encode(t, x));
    return load(t, &narrow, 0);
}

INLINE float sum(vf x) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
#endif
}

INLINE int32_t largest_integer(vi x) {
#if LANES == 16
    return _mm512_reduce_max_epi32((__m512i)x);
#else
    int32_t found = x[0];
    for (int i = 1; i < LANES; i++) found = x[i] > found ? x[i] : found;
    return found;
#endif
}

INLINE int32_t sum_integers(vi x) {
    int32_t total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

/* e^x to 2 units in the last place: 2^n times a polynomial in the rest of x / ln 2; 0 for x < -87. */
INLINE vf exponential(vf x) {
    x = larger(x, splat(-87.0f));
    x = -larger(-x, splat(-88.0f));
    vf n = nearest(x * 1.44269504f);
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
}

/* STEP channels of a row: two registers, in their order; INT4: the even channels and the odd ones. */
INLINE void load_step(enum type t, const void *row, size_t i, vf step[2]) {
    const char *p = (const char *)row + bytes_of(t, i);
    if (t != INT4) {
        step[0] = load(t, p, 0);
        step[1] = load(t, p, LANES);
        return;
    }
#if LANES == 16
    const vf values = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    __m512i nibbles = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));
    step[0] = (vf)_mm512_permutexvar_ps(nibbles, (__m512)values); /* uses the low four bits of each index */
    step[1] = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(nibbles, 4), (__m512)values);
#else
    vi nibbles = (vi)widen_bytes(p);
    step[0] = __builtin_convertvector(nibbles << 28 >> 28, vf);
    step[1] = __builtin_convertvector(nibbles << 24 >> 28, vf);
#endif
}

/* load_step where only `left` channels remain: zeros after the last. */
INLINE void load_step_part(enum type t, const void *row, size_t i, size_t left, vf step[2]) {
    char p[4 * STEP] = {0};
    memcpy(p, (const char *)row + bytes_of(t, i), bytes_of(t, left));
    load_step(t, p, 0, step);
}

#endif
