/* The innermost loop of products of many tokens: a few rows of a block, one word at a time, times a panel of tokens.

   Blocks and panels consist of 32-bit words, and what a word holds decides the arithmetic. */
#ifndef TILE_H
#define TILE_H
#include "products.h"

#define WIDTH (2 * LANES) /* tokens of a panel [words, WIDTH]; one of at most LANES tokens is [words, LANES] */

enum arithmetic {
    FLOATS,   /* a word is a channel in float32 */
    INTEGERS, /* two channels as 16-bit integers, whose products are summed exactly in 32 bits */
    BFLOATS,  /* two channels in bfloat16, whose products are summed in float32 */
};

#if LANES == 16 && defined(__AVX512VNNI__)
#define HAS_INTEGERS 1
#define INTEGER_DOT  "vpdpwssd"
#elif LANES == 8 && defined(__AVXVNNI__)
#define HAS_INTEGERS 1
#define INTEGER_DOT  "%{vex%} vpdpwssd"
#else
#define HAS_INTEGERS 0
#endif
#if LANES == 16 && defined(__AVX512BF16__)
#define HAS_BFLOATS 1
#else
#define HAS_BFLOATS 0
#endif

/* total += w * x, word by word.  Compilers move the sums to memory and back around the intrinsics of two of these. */
INLINE vf multiply_add(enum arithmetic kind, vf total, vf w, vf x) {
    if (kind == FLOATS) return total + w * x;
#if HAS_INTEGERS
    if (kind == INTEGERS) __asm__(INTEGER_DOT " %2, %1, %0" : "+v"(total) : "v"(w), "v"(x));
#endif
#if HAS_BFLOATS
    if (kind == BFLOATS) __asm__("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(w), "v"(x));
#endif
    return total;
}

INLINE size_t words_of(enum arithmetic kind, size_t channels) { return kind == FLOATS ? channels : channels / 2; }

/* total[r][:] = sum over k < n of w[r * row_pitch + k * pitch] * panel[k, registers * LANES] */
INLINE void multiply(enum arithmetic kind, int rows, int registers, const float *w, size_t row_pitch, size_t pitch,
                     const float *panel, size_t n, vf total[][2]) {
    UNROLL for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = (vf){0};
    for (size_t k = 0; k < n; k++) {
        vf x[2];
        UNROLL for (int j = 0; j < registers; j++) x[j] = LOAD(vf, panel + (k * registers + j) * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            vf weight = (vf)((vi){0} + LOAD(int32_t, w + r * row_pitch + k * pitch));
            UNROLL for (int j = 0; j < registers; j++) total[r][j] = multiply_add(kind, total[r][j], weight, x[j]);
        }
    }
}

/* sums[r * pitch, registers * LANES] += total[r] */
INLINE void add_tile(int rows, int registers, float *sums, size_t pitch, vf total[][2]) {
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < registers; j++) {
        vf after = LOAD(vf, sums + r * pitch + j * LANES) + total[r][j];
        memcpy(sums + r * pitch + j * LANES, &after, sizeof after);
    }
}

/* How the words of one product are made. */
struct plan {
    enum arithmetic kind;
    size_t words;        /* words of a token, whose channels are filled up to a multiple of STEP */
    size_t stride;       /* words and scales of a token */
    size_t group;        /* INTEGERS: channels of W with one scale, a multiple of STEP */
    size_t x_group;      /* INTEGERS: channels of x with one scale */
    size_t block_groups; /* groups of DEPTH channels of W */
    int own_groups;      /* whether these are W's own */
    int bits;            /* INTEGERS: bits of an activation, and of a float16 weight, beside the sign */
};

#if LANES == 8
#define ROWS 6
#else
#define ROWS 12 /* each has two registers of sums */
#endif
#define STRIPE (4 * ROWS)
#define DEPTH  512          /* channels of a block */
#define PITCH  (DEPTH + 16) /* words between rows, so that rows do not map to the same cache sets */
_Static_assert(DEPTH * 127 * 127 < 1 << 24, "a float sums SmoothQuant's integers of a block exactly");
_Static_assert(DEPTH * 128 * 32752L < 1L << 31, "32 bits hold a block's sum of INT8 weights times 15-bit activations");
#define HALF_GROUP 32 /* channels of float16 weights that have one scale; no group is smaller */
#define GROUPS     (DEPTH / HALF_GROUP)
_Static_assert(HALF_GROUP * 8188L * 8188L < 1L << 31, "32 bits hold a group's sum of 13-bit numbers of 11 digits");

/* STRIPE rows of W, DEPTH channels of each. */
struct block {
    float words[STRIPE * PITCH];
    float scales[STRIPE][GROUPS]; /* INTEGERS */
};

struct plan make_plan(const struct matrix *w, enum type x);

/* Tokens first to first + n of x, n <= registers * LANES, as a panel: its words, then the scales of its groups; zeros
   after the last token.  row: memory for one token; token_scales: [registers * LANES], of operand_scale. */
void pack_panel(const struct matrix *w, const struct plan *plan, const struct rows *x, const float *scales,
                size_t first, size_t n, int registers, struct operand *row, float *panel, float *token_scales);

/* Channels i to i + n of a row of W as row r of the block, zeros up to the next STEP. */
void unpack_row(const struct matrix *w, const struct plan *plan, size_t row, size_t i, size_t n, struct block *to,
                size_t r);

#endif
