/* Weights and activations as the words of blocks and panels.

   INTEGERS: with its group's largest magnitude below 2^e, a number is round(number * 2^(bits - e)), so that it is exact
   where its digits end above 2^(e - bits) and else off by 2^(e - bits - 1) at most.  INT4 and INT8 weights are exact.
 */
#include "tile.h"

static size_t common_divisor(size_t a, size_t b) { return b ? common_divisor(b, a % b) : a; }

struct plan make_plan(const struct matrix *w, enum type x) {
    struct plan plan = {.kind = FLOATS, .group = DEPTH, .bits = 15};
    int halves = x == F16 || x == BF16;
    if (HAS_BFLOATS && (w->type == FP8 || (w->type == BF16 && x == BF16))) plan.kind = BFLOATS;
    if (HAS_INTEGERS && halves && !w->w8a8 && (w->type == INT8 || w->type == INT4 || (w->type == F16 && x == F16)))
        plan.kind = INTEGERS;
    if (w->type == INT4 && w->groups > 1) plan.group = common_divisor(DEPTH, w->in / w->groups);
    if (w->type == F16) plan.group = HALF_GROUP, plan.bits = 13;
    plan.words = words_of(plan.kind, up_to(w->in, STEP));
    plan.stride = plan.words + (plan.kind == INTEGERS ? up_to(w->in, plan.group) / plan.group : 0);
    return plan;
}

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

/* A step of numbers as STEP / 2 words. */
INLINE void store_words(enum arithmetic kind, const vf step[2], float power, float *to) {
    for (int j = 0; j < 2; j++) {
        char *at = (char *)to + 2 * j * LANES;
        if (kind == INTEGERS) {
            vi q = __builtin_convertvector(nearest(step[j] * power), vi);
            halves numbers = low_halves((vu)q);
            memcpy(at, &numbers, sizeof numbers);
        } else store(BF16, at, 0, step[j], LANES);
    }
}

/* One token's numbers as words, and INTEGERS' scales. */
static void token_words(const struct plan *plan, const float *x, size_t n, float *words) {
    float *scales = words + plan->words, power = 1;
    for (size_t i = 0; i < n; i += STEP) {
        if (plan->kind == INTEGERS && i % plan->group == 0) {
            vi largest = {0};
            for (size_t k = i; k < n && k < i + plan->group; k += LANES)
                largest = larger_magnitude(largest, LOAD(vf, x + k));
            power = power_for(largest, plan->bits, scales + i / plan->group);
        }
        vf step[2] = {LOAD(vf, x + i), LOAD(vf, x + i + LANES)};
        store_words(plan->kind, step, power, words + i / 2);
    }
}

void pack_panel(const struct matrix *w, const struct plan *plan, const struct rows *x, const float *scales,
                size_t first, size_t n, int registers, struct operand *row, float *panel, float *token_scales) {
    size_t width = registers * LANES;
    memset(panel, 0, width * plan->stride * sizeof *panel);
    for (size_t t = 0; t < n; t++) {
        struct rows one = {(char *)x->data + (first + t) * bytes_of(x->type, w->in), 1, x->type};
        prepare_token(w, &one, scales ? scales + first + t : NULL, row, 0);
        const float *words = row->floats;
        if (plan->kind != FLOATS) token_words(plan, row->floats, row->stride, row->words), words = row->words;
        for (size_t k = 0; k < plan->stride; k++) memcpy(panel + k * width + t, words + k, sizeof *words);
        token_scales[t] = operand_scale(w, row, 0);
    }
}

/* INT4: of channel i's group. */
INLINE float group_scale(const struct matrix *w, size_t row, size_t i) {
    const char *scales = (const char *)w->scale + row * bytes_of(w->scale_type, w->groups);
    return load_part(w->scale_type, scales, i / (w->in / w->groups), w->groups)[0];
}

INLINE float group_zero(const struct matrix *w, size_t row, size_t i) {
    return w->zero ? w->zero[row * w->groups + i / (w->in / w->groups)] : 0;
}

INLINE void unpack(const struct matrix *w, enum type t, enum arithmetic kind, const struct plan *plan, size_t row,
                   size_t i, size_t n, struct block *block, size_t r) {
    const char *data = (const char *)w->data + row * bytes_of(t, w->in);
    float *to = block->words + r * PITCH, scale = 1, zero = 0, power = 1;
    size_t group = kind == INTEGERS ? plan->group : (size_t)(w->in / w->groups);
    for (size_t k = 0; k < n; k += STEP) {
        vf v[2];
        if (t == INT4 && (k == 0 || (i + k) % group == 0)) {
            scale = group_scale(w, row, i + k);
            zero = group_zero(w, row, i + k);
        }
        if (kind == INTEGERS && k % group == 0) {
            float *group_to = &block->scales[r][k / group];
            vi largest = {0};
            for (size_t j = k; t == F16 && j < n && j < k + group; j += LANES)
                largest = larger_magnitude(largest, load_part(t, data, i + j, w->in));
            if (t == F16) power = power_for(largest, plan->bits, group_to);
            else *group_to = scale;
        }
        if (k + STEP <= n) load_step(t, data, i + k, v);
        else load_step_part(t, data, i + k, n - k, v);
        if (t == INT4) v[0] -= zero, v[1] -= zero;
        if (kind == FLOATS) {
            if (t == INT4) v[0] *= scale, v[1] *= scale;
            memcpy(to + k, v, sizeof v);
        } else store_words(kind, v, power, to + k / 2);
    }
}

void unpack_row(const struct matrix *w, const struct plan *plan, size_t row, size_t i, size_t n, struct block *to,
                size_t r) {
    switch (plan->kind) {
    case INTEGERS:
        switch (w->type) {
        case F16: return unpack(w, F16, INTEGERS, plan, row, i, n, to, r);
        case INT8: return unpack(w, INT8, INTEGERS, plan, row, i, n, to, r);
        default: return unpack(w, INT4, INTEGERS, plan, row, i, n, to, r);
        }
    case BFLOATS:
        if (w->type == FP8) return unpack(w, FP8, BFLOATS, plan, row, i, n, to, r);
        return unpack(w, BF16, BFLOATS, plan, row, i, n, to, r);
    default:
        switch (w->type) {
        case F32: return unpack(w, F32, FLOATS, plan, row, i, n, to, r);
        case F16: return unpack(w, F16, FLOATS, plan, row, i, n, to, r);
        case BF16: return unpack(w, BF16, FLOATS, plan, row, i, n, to, r);
        case FP8: return unpack(w, FP8, FLOATS, plan, row, i, n, to, r);
        case INT8: return unpack(w, INT8, FLOATS, plan, row, i, n, to, r);
        default: return unpack(w, INT4, FLOATS, plan, row, i, n, to, r);
        }
    }
}
