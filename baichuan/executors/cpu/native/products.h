#ifndef PRODUCTS_H
#define PRODUCTS_H
#include "vector.h"

/* A matrix [out, in] as the engine file has it, row by row: Matrix of native.py. */
struct matrix {
    const void *data;
    const void *scale;        /* [out, groups] of scale_type; NULL for F32, F16 and BF16 */
    const float *input_scale; /* [1], of FP8 and static SmoothQuant */
    const float *smoother;    /* [in], of SmoothQuant */
    int64_t out, in, groups;
    int32_t type, scale_type;
    int32_t w8a8; /* SmoothQuant */
};

/* Rows of activations or results: [tokens, features] of one type, without gaps. */
struct rows {
    void *data;
    int64_t tokens;
    int32_t type;
};

/* Activations in the form that a matrix asks for, as floats: [tokens, stride], zeros behind the last channel.
   INT4: in each STEP the even channels come before the odd ones.  SmoothQuant: integers, and a scale for each token. */
struct operand {
    float *floats;
    float *scales;
    size_t stride;
    void *memory;
};

INLINE size_t up_to(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/* What a sum is multiplied by: the token's scale and then the row's (INT4: is in the sum). */
INLINE float operand_scale(const struct matrix *w, const struct operand *x, size_t token) {
    return w->w8a8 ? x->scales[token] : w->type == FP8 ? *w->input_scale : 1;
}

INLINE float row_scale(const struct matrix *w, size_t row) {
    return w->scale && w->type != INT4 ? ((const float *)w->scale)[row] : 1;
}

/* Room for the activations.  0 where there is none. */
int make_operand(const struct matrix *w, size_t tokens, struct operand *to);

/* One token's activations; scales: of SmoothQuant's tokens where they are known already. */
void prepare_token(const struct matrix *w, const struct rows *x, const float *scales, struct operand *to, size_t token);

/* y = x @ Wᵀ, by the way that suits the number of tokens.  0 where there is no memory, else 1.
   scales: [tokens] of SmoothQuant's inputs where they are known already, else NULL. */
int product(const struct matrix *w, const struct rows *x, const float *scales, const struct rows *y, int threads);
int few_rows_product(const struct matrix *w, const struct rows *x, const float *scales, const struct rows *y,
                     int threads);
int many_rows_product(const struct matrix *w, const struct rows *x, const float *scales, const struct rows *y,
                      int threads);

#endif
