#ifndef PRODUCTS_H
#define PRODUCTS_H
#include "vector.h"

/* A matrix [out, in] row by row as in the engine file; must equal _Matrix in native.py. */
struct matrix {
    const void *data;
    const void *scale;        /* [out, groups] of scale_type; NULL for F32, F16 and BF16 */
    const int8_t *zero;       /* [out, groups], with INT4 that is not symmetric, else NULL */
    const float *input_scale; /* [1], with static FP8 and SmoothQuant, else NULL */
    const float *smoother;    /* [in], with SmoothQuant, else NULL */
    int64_t out, in, groups;
    int32_t type, scale_type;
    int32_t w8a8; /* 1 with SmoothQuant: the activations become 8-bit integers */
};

/* Rows of activations or results: [tokens, features] of one type, contiguous. */
struct rows {
    void *data;
    int64_t tokens;
    int32_t type;
};

/* Activations as a matrix needs them, in floats: [tokens, stride], zeros after the last channel.
   INT4: in each STEP the even channels come before the odd ones.  SmoothQuant: integers, FP8: numbers of e4m3, and a
   scale per token. */
struct operand {
    float *floats;
    float *scales;
    float *words; /* [2 * stride], room for a token as words of a panel */
    size_t stride;
    void *memory;
};

/* A sum is multiplied by the token's scale, then by the row's; INT4's scales are in the sum already. */
INLINE float operand_scale(const struct matrix *w, const struct operand *x, size_t token) {
    return w->w8a8 || w->type == FP8 ? x->scales[token] : 1;
}

INLINE float row_scale(const struct matrix *w, size_t row) {
    return w->scale && w->type != INT4 ? ((const float *)w->scale)[row] : 1;
}

/* Allocates memory for the activations of `tokens` tokens.  Returns 0 if that fails, else 1. */
int make_operand(const struct matrix *w, size_t tokens, struct operand *to);

/* Fills in one token's activations.  scales: [tokens], SmoothQuant's if already known, else NULL. */
void prepare_token(const struct matrix *w, const struct rows *x, const float *scales, struct operand *to, size_t token);

/* y = x @ Wᵀ, by the faster way for the number of tokens.  Returns 0 if memory is short, else 1.
   scales: [tokens], SmoothQuant's input scales if already known, else NULL. */
int product(const struct matrix *w, const struct rows *x, const float *scales, const struct rows *y, int threads);
int few_rows_product(const struct matrix *w, const struct rows *x, const float *scales, const struct rows *y,
                     int threads);
int batch_suits(const struct matrix *w, const struct rows *x);
int batch_product(const struct matrix *w, const struct rows *x, const struct rows *y, int threads);
int many_rows_product(const struct matrix *w, const struct rows *x, const float *scales, const struct rows *y,
                      int threads);

#endif
