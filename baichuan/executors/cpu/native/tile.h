/* The innermost loop of products of many tokens: a few rows of numbers, one at a time, times a panel of WIDTH tokens.
 */
#ifndef TILE_H
#define TILE_H
#include "products.h"

#define WIDTH (2 * LANES)

/* total[r][:] = sum over k < n of w[r * row_pitch + k * pitch] * panel[k, WIDTH] */
INLINE void multiply(int rows, const float *w, size_t row_pitch, size_t pitch, const float *panel, size_t n,
                     vf total[][2]) {
    UNROLL for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = (vf){0};
    for (size_t k = 0; k < n; k++) {
        vf a = LOAD(vf, panel + k * WIDTH), b = LOAD(vf, panel + k * WIDTH + LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            vf weight = splat(w[r * row_pitch + k * pitch]);
            total[r][0] += weight * a;
            total[r][1] += weight * b;
        }
    }
}

/* sums[r * pitch, WIDTH] += total[r] */
INLINE void add_tile(int rows, float *sums, size_t pitch, vf total[][2]) {
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int half = 0; half < 2; half++) {
        vf after = LOAD(vf, sums + r * pitch + half * LANES) + total[r][half];
        memcpy(sums + r * pitch + half * LANES, &after, sizeof after);
    }
}

#endif
