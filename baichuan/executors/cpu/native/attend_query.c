/* Attention of one query, at the memory's speed: the cache is read in order and fetched ahead, across its blocks. */
#include "attention.h"

#define FETCH   4  /* keys, or values, that are multiplied at once */
#define AHEAD   24 /* that are fetched ahead */
#define VECTORS 8  /* registers of sums of values */

/* Fetches FETCH keys of the head from `position` on, which runs on to its values and the next head's keys. */
INLINE void fetch(enum type t, const struct cache *c, size_t row, size_t head, size_t context, size_t position) {
    void *kept = position < context || position >= 2 * context ? c->k : c->v;
    if (position >= 2 * context) head += head + 1 < (size_t)c->heads;
    const char *from = entry(c, kept, row, head, position % context);
    for (size_t byte = 0; byte < bytes_of(t, FETCH * c->dim); byte += 64) __builtin_prefetch(from + byte);
}

/* How many keys or values are next, in blocks of `size`, where `left` are left. */
INLINE size_t taken(size_t size, size_t left) {
    size_t most = size < FETCH ? size : FETCH;
    return left < most ? left : most;
}

/* scores[j] = q · key j, for n keys */
INLINE void multiply_keys(enum type t, size_t dim, const char *keys, int n, const float *q, float *scores) {
    vf total[FETCH] = {0};
    size_t i = 0;
    for (; i + LANES <= dim; i += LANES)
        UNROLL for (int j = 0; j < n; j++) total[j] += load(t, keys + bytes_of(t, j * dim), i) * LOAD(vf, q + i);
    for (int j = 0; j < n; j++) {
        if (i < dim) total[j] += load_part(t, keys + bytes_of(t, j * dim), i, dim) * LOAD(vf, q + i);
        scores[j] = sum(total[j]);
    }
}

/* out += the weighted sum of n values, `vectors` registers of channels from i on. */
INLINE void add_values(enum type t, size_t dim, const char *values, const float *weights, size_t n, size_t i,
                       int vectors, float *out) {
    vf total[VECTORS];
    UNROLL for (int v = 0; v < vectors; v++) total[v] = LOAD(vf, out + i + v * LANES);
    for (size_t j = 0; j < n; j++)
        UNROLL for (int v = 0; v < vectors; v++)
            total[v] += (vectors > 1 ? load(t, values + bytes_of(t, j * dim), i + v * LANES)
                                     : load_part(t, values + bytes_of(t, j * dim), i, dim)) * weights[j];
    UNROLL for (int v = 0; v < vectors; v++) memcpy(out + i + v * LANES, &total[v], sizeof total[v]);
}

/* attend_query for one type of cache. */
INLINE void attend_head(enum type t, const struct cache *c, size_t row, size_t head, size_t context, const float *q,
                        float *scores, float *out) {
    size_t dim = c->dim, size = (size_t)1 << c->block_bits;
    float slope = c->slopes ? c->slopes[head] : 0, highest = -INFINITY;
    for (size_t first = 0, n; first < context; first += n) {
        n = taken(size, context - first);
        const char *keys = entry(c, c->k, row, head, first);
        fetch(t, c, row, head, context, first + AHEAD);
        if (n == FETCH) multiply_keys(t, dim, keys, FETCH, q, scores + first);
        else
            for (size_t j = 0; j < n; j++)
                multiply_keys(t, dim, keys + bytes_of(t, j * dim), 1, q, scores + first + j);
        for (size_t j = 0; j < n; j++) {
            scores[first + j] -= slope * (float)(context - 1 - first - j);
            highest = scores[first + j] > highest ? scores[first + j] : highest;
        }
    }
    vf totals = {0};
    for (size_t k = 0; k < context; k += LANES) {
        vf p = exponential(load_part(F32, scores, k, context) - highest);
        store(F32, scores, k, p, context - k < LANES ? context - k : LANES);
        totals += load_part(F32, scores, k, context);
    }
    float inverse = 1 / sum(totals);
    for (size_t k = 0; k < context; k++) scores[k] *= inverse;
    memset(out, 0, up_to(dim, LANES) * sizeof *out);
    for (size_t first = 0, n; first < context; first += n) {
        n = taken(size, context - first);
        const char *values = entry(c, c->v, row, head, first);
        size_t i = 0;
        fetch(t, c, row, head, context, context + first + AHEAD);
        for (; i + VECTORS * LANES <= dim; i += VECTORS * LANES)
            add_values(t, dim, values, scores + first, n, i, VECTORS, out);
        for (; i < dim; i += LANES) add_values(t, dim, values, scores + first, n, i, 1, out);
    }
}

void attend_query(const struct cache *c, size_t row, size_t head, size_t context, const float *q, float *scores,
                  float *out) {
    switch (c->type) {
    case F32: return attend_head(F32, c, row, head, context, q, scores, out);
    case F16: return attend_head(F16, c, row, head, context, q, scores, out);
    case BF16: return attend_head(BF16, c, row, head, context, q, scores, out);
    case INT8: return attend_head(INT8, c, row, head, context, q, scores, out);
    default: return attend_head(FP8, c, row, head, context, q, scores, out);
    }
}
