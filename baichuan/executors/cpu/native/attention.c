/* Attention over the KV cache: a few tokens of a sequence one by one, many in panels of WIDTH. */
#include "attention.h"
#include "tile.h"

#if LANES == 8
#define KEYS 4 /* keys, or channels of the values, that are multiplied at once */
#else
#define KEYS 8
#endif
#define CHUNK       32 /* keys whose values are unpacked at once */
#define FEW_QUERIES 8  /* more new tokens of a sequence than this go in panels */

static void rotate(const struct cache *c, enum type t, void *head, int64_t position) {
    size_t half = c->dim / 2;
    const float *cos = c->cos + position * half, *sin = c->sin + position * half;
    for (size_t i = 0; i < half; i += LANES) {
        size_t n = half - i < LANES ? half - i : LANES;
        char *second = (char *)head + bytes_of(t, half);
        vf x1 = load_part(t, head, i, half), x2 = load_part(t, second, i, half);
        vf cosine = load_part(F32, cos, i, half), sine = load_part(F32, sin, i, half);
        store(t, head, i, x1 * cosine - x2 * sine, n);
        store(t, second, i, x2 * cosine + x1 * sine, n);
    }
}

static void keep(const struct cache *c, enum type t, const void *head, void *to, const float *scale) {
    for (size_t i = 0; i < (size_t)c->dim; i += LANES) {
        vf x = load_part(t, head, i, c->dim);
        if (c->type == INT8) x = clamp(x / *scale, 127);
        if (c->type == FP8) x = clamp(x / *scale, 448);
        store(c->type, to, i, x, c->dim - i < LANES ? c->dim - i : LANES);
    }
}

/* Rotates q and k of qkv [tokens, 3 * heads * dim] in place (RoPE) and stores k and v.  rows, positions: [tokens], in
   the cache */
static void store_tokens(const struct cache *c, const struct rows *qkv, const int64_t *rows, const int64_t *positions,
                         int threads) {
    size_t wide = 3 * c->heads * c->dim;
#pragma omp parallel for schedule(static) num_threads(threads) if (qkv->tokens > 1)
    for (int64_t token = 0; token < qkv->tokens; token++)
        for (int64_t head = 0; head < c->heads; head++) {
            char *q = (char *)qkv->data + bytes_of(qkv->type, token * wide + head * c->dim);
            char *k = q + bytes_of(qkv->type, c->heads * c->dim), *v = k + bytes_of(qkv->type, c->heads * c->dim);
            if (c->cos) {
                rotate(c, qkv->type, q, positions[token]);
                rotate(c, qkv->type, k, positions[token]);
            }
            keep(c, qkv->type, k, entry(c, c->k, rows[token], head, positions[token]), c->k_scale);
            keep(c, qkv->type, v, entry(c, c->v, rows[token], head, positions[token]), c->v_scale);
        }
}

/* One step's tokens. */
struct queries {
    const struct rows *qkv;
    const int64_t *rows, *positions; /* [tokens], in the cache */
};

/* The queries' memory of one thread. */
struct work {
    float *queries; /* [dim, WIDTH], scaled, zeros after the last token */
    float *block;   /* keys or values as floats, [KEYS or CHUNK, pitch], pitch a multiple of KEYS and LANES */
    float *sums;    /* [pitch, WIDTH] */
    float *scores;  /* [keys, WIDTH] */
    void *memory;
};

static int make_work(const struct cache *c, size_t longest, struct work *to) {
    size_t pitch = up_to(c->dim, 2 * LANES), keys = up_to(longest, CHUNK);
    to->memory = malloc((2 * pitch * WIDTH + CHUNK * pitch + keys * WIDTH) * sizeof(float) + 64);
    to->queries = (float *)up_to((uintptr_t)to->memory, 64);
    to->sums = to->queries + pitch * WIDTH;
    to->block = to->sums + pitch * WIDTH;
    to->scores = to->block + CHUNK * pitch;
    return to->memory != NULL;
}

INLINE float query_scale(const struct cache *c) { return (c->k_scale ? *c->k_scale : 1) / sqrtf(c->dim); }

INLINE const char *query_of(const struct cache *c, const struct rows *qkv, size_t token, size_t head) {
    return (const char *)qkv->data + bytes_of(qkv->type, (3 * token * c->heads + head) * c->dim);
}

static void attend_token(const struct cache *c, const struct queries *all, size_t token, size_t head, struct work *work,
                         char *y) {
    float *q = work->queries, *out = work->sums;
    enum type t = all->qkv->type;
    for (size_t i = 0, dim = c->dim; i < dim; i += LANES) {
        vf x = load_part(t, query_of(c, all->qkv, token, head), i, dim) * query_scale(c);
        memcpy(q + i, &x, sizeof x);
    }
    attend_query(c, all->rows[token], head, all->positions[token] + 1, q, work->scores, out);
    for (size_t i = 0, dim = c->dim; i < dim; i += LANES)
        store(t, y + bytes_of(t, (token * c->heads + head) * dim), i,
              LOAD(vf, out + i) * (c->v_scale ? *c->v_scale : 1), dim - i < LANES ? dim - i : LANES);
}

/* n of a row's keys or values as floats, zeros from position `context` on. */
static void unpack_entries(const struct cache *c, void *kept, size_t row, size_t head, size_t first, size_t n,
                           size_t context, size_t pitch, float *to) {
    for (size_t k = 0; k < n; k++, to += pitch) {
        if (first + k >= context) {
            memset(to, 0, pitch * sizeof *to);
            continue;
        }
        const char *from = entry(c, kept, row, head, first + k);
        for (size_t i = 0; i < pitch; i += LANES) {
            vf v = i < (size_t)c->dim ? load_part(c->type, from, i, c->dim) : (vf){0};
            memcpy(to + i, &v, sizeof v);
        }
    }
}

/* scores = exp(scores + bias - their maximum) of each query's keys, 0 for later keys; totals: their sums.
   last: the queries' positions. */
static void exponentials(float *scores, size_t keys, const vi last[2], float slope, vf totals[2]) {
    UNROLL for (int half = 0; half < 2; half++) {
        vf highest = splat(-INFINITY);
        for (size_t k = 0; k < keys; k++) {
            float *at = scores + k * WIDTH + half * LANES;
            vi distance = last[half] - (int32_t)k, seen = distance >= 0;
            vf score = LOAD(vf, at) - __builtin_convertvector(distance, vf) * slope;
            score = (vf)(((vi)score & seen) | ((vi)splat(-INFINITY) & ~seen));
            highest = larger(highest, score);
            memcpy(at, &score, sizeof score);
        }
        totals[half] = (vf){0};
        for (size_t k = 0; k < keys; k++) {
            float *at = scores + k * WIDTH + half * LANES;
            vi seen = last[half] >= (int32_t)k;
            vf p = (vf)((vi)exponential(LOAD(vf, at) - highest) & seen);
            totals[half] += p;
            memcpy(at, &p, sizeof p);
        }
    }
}

/* Attention of n <= WIDTH tokens of one sequence from `token` on. */
static void attend_panel(const struct cache *c, const struct queries *all, size_t token, size_t n, size_t head,
                         struct work *work, char *y) {
    enum type t = all->qkv->type;
    size_t dim = c->dim, pitch = up_to(dim, 2 * LANES), row = all->rows[token];
    size_t context = all->positions[token + n - 1] + 1, keys = up_to(context, CHUNK);
    vi last[2];
    vf totals[2], total[KEYS][2];
    memset(work->queries, 0, pitch * WIDTH * sizeof(float));
    memset(work->sums, 0, pitch * WIDTH * sizeof(float));
    for (size_t q = 0; q < WIDTH; q++) {
        last[q / LANES][q % LANES] = all->positions[token + (q < n ? q : n - 1)];
        for (size_t i = 0; i < dim && q < n; i += LANES) {
            vf x = load_part(t, query_of(c, all->qkv, token + q, head), i, dim) * query_scale(c);
            for (size_t j = 0; j < LANES; j++) work->queries[(i + j) * WIDTH + q] = x[j];
        }
    }
    for (size_t k = 0; k < keys; k += KEYS) {
        unpack_entries(c, c->k, row, head, k, KEYS, context, pitch, work->block);
        multiply(FLOATS, KEYS, 2, work->block, pitch, 1, work->queries, dim, total);
        memcpy(work->scores + k * WIDTH, total, sizeof total);
    }
    exponentials(work->scores, keys, last, c->slopes ? c->slopes[head] : 0, totals);
    for (size_t k = 0; k < keys; k += CHUNK) {
        unpack_entries(c, c->v, row, head, k, CHUNK, context, pitch, work->block);
        for (size_t i = 0; i < dim; i += KEYS) {
            multiply(FLOATS, KEYS, 2, work->block + i, 1, pitch, work->scores + k * WIDTH, CHUNK, total);
            add_tile(KEYS, 2, work->sums + i * WIDTH, WIDTH, total);
        }
    }
    for (size_t q = 0; q < n; q++)
        for (size_t i = 0; i < dim; i += LANES) {
            vf out;
            for (size_t j = 0; j < LANES; j++) out[j] = work->sums[(i + j) * WIDTH + q];
            store(t, y + bytes_of(t, ((token + q) * c->heads + head) * dim), i,
                  out * ((c->v_scale ? *c->v_scale : 1) / totals[q / LANES][q % LANES]),
                  dim - i < LANES ? dim - i : LANES);
        }
}

/* softmax(q kᵀ / sqrt(dim) + bias) v of each token over the keys up to its position, once all are stored.
   qkv, rows, positions: as in store_tokens; starts: [sequences + 1], sequence s has the tokens starts[s] to
   starts[s + 1]; longest: above every position; y: [tokens, heads * dim].  Returns 0 if memory is short, else 1. */
int attend(const struct cache *c, const struct rows *qkv, const int64_t *rows, const int64_t *positions,
           const int32_t *starts, int64_t sequences, int64_t longest, void *y, int threads) {
    store_tokens(c, qkv, rows, positions, threads);
    const struct queries all = {qkv, rows, positions};
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        struct work work;
        int ready = make_work(c, longest, &work);
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
        for (int64_t s = 0; s < sequences; s++) {
            size_t new = starts[s + 1] - starts[s], width = new <= FEW_QUERIES ? 1 : WIDTH;
            size_t parts = up_to(new, width) / width;
            int64_t chunk = width == 1 ? up_to(c->heads, threads) / threads : 1; /* fetch goes from head to head */
#pragma omp for schedule(dynamic, chunk) nowait
            for (size_t item = 0; item < parts * c->heads; item++) {
                size_t head = item % c->heads, at = (parts - 1 - item / c->heads) * width; /* the longest part first */
                if (!ready) continue;
                if (width == 1) attend_token(c, &all, starts[s] + at, head, &work, y);
                else attend_panel(c, &all, starts[s] + at, new - at < WIDTH ? new - at : WIDTH, head, &work, y);
            }
        }
        free(work.memory);
    }
    return !failed;
}
