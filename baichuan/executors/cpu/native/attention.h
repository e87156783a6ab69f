#ifndef ATTENTION_H
#define ATTENTION_H
#include "vector.h"

/* One layer's cache, k and v [blocks, heads, tokens of a block, dim], and its position encoding. */
struct cache {
    void *k, *v;
    const int32_t *tables;          /* [rows, blocks_per_row]: where a row's blocks lie in k and v */
    const float *k_scale, *v_scale; /* [1], with an 8-bit cache */
    const float *cos, *sin;         /* [positions, dim / 2]; NULL without RoPE */
    const float *slopes;            /* [heads]; NULL without ALiBi */
    int64_t heads, blocks_per_row, dim;
    int32_t block_bits; /* a block is for 1 << block_bits tokens */
    int32_t type;
};

/* Where one head's key or value of a position begins; the positions of a block follow one another. */
INLINE char *entry(const struct cache *c, void *kept, size_t row, size_t head, size_t position) {
    size_t block = c->tables[row * c->blocks_per_row + (position >> c->block_bits)];
    size_t place = ((block * c->heads + head) << c->block_bits) + (position & (((size_t)1 << c->block_bits) - 1));
    return (char *)kept + bytes_of(c->type, place * c->dim);
}

/* One query over the first `context` keys of one head.  q: [dim], scaled; scores: [context]; out: [dim]; q and out with
   zeros up to LANES. */
void attend_query(const struct cache *c, size_t row, size_t head, size_t context, const float *q, float *scores,
                  float *out);

#endif
