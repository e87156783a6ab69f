/* Weights and activations as the words of blocks and panels. */
#include "unpack.h"

static size_t common_divisor(size_t a, size_t b) { return b ? common_divisor(b, a % b) : a; }

struct plan make_plan(const struct matrix *w, enum type x) {
    struct plan plan = {.kind = FLOATS, .group = DEPTH, .x_group = DEPTH, .bits = 15};
    int halves = x == F16 || x == BF16;
    if (HAS_BFLOATS && (w->type == FP8 || (w->type == BF16 && x == BF16))) plan.kind = BFLOATS;
    if (HAS_INTEGERS && halves && !w->w8a8 && (w->type == INT8 || w->type == INT4 || (w->type == F16 && x == F16)))
        plan.kind = INTEGERS;
    if (w->type == INT4 && w->groups > 1) plan.group = common_divisor(DEPTH, w->in / w->groups);
    if (w->type == F16) plan.group = plan.x_group = HALF_GROUP, plan.bits = 13;
    plan.block_groups = DEPTH / plan.group;
    plan.own_groups = (int64_t)plan.group * w->groups == w->in;
    plan.words = words_of(plan.kind, up_to(w->in, STEP));
    plan.stride = plan.words + (plan.kind == INTEGERS ? up_to(w->in, plan.x_group) / plan.x_group : 0);
    return plan;
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
        if (plan->kind == INTEGERS && i % plan->x_group == 0) {
            vi largest = {0};
            for (size_t k = i; k < n && k < i + plan->x_group; k += LANES)
                largest = larger_magnitude(largest, LOAD(vf, x + k));
            power = power_for(largest, plan->bits, scales + i / plan->x_group);
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

/* Channels i to i + n of a float16 row as INTEGERS. */
static void unpack_halves(const struct matrix *w, const struct plan *plan, size_t row, size_t i, size_t n, float *words,
                          float scales[GROUPS]) {
    const char *data = (const char *)w->data + row * bytes_of(F16, w->in);
    float power = 1;
    for (size_t k = 0; k < n; k += STEP) {
        if (k % HALF_GROUP == 0) {
            vi largest = {0};
            for (size_t j = k; j < n && j < k + HALF_GROUP; j += LANES)
                largest = larger_magnitude(largest, load_part(F16, data, i + j, w->in));
            power = power_for(largest, plan->bits, scales + k / HALF_GROUP);
        }
        vf step[2] = {load_part(F16, data, i + k, w->in), (vf){0}};
        if (k + LANES < n) step[1] = load_part(F16, data, i + k + LANES, w->in);
        store_words(INTEGERS, step, power, words + k / 2);
    }
}

/* Channels i to i + n of a row as FLOATS, INT4 times their scale, or as BFLOATS. */
INLINE void unpack_floats(const struct matrix *w, enum type t, enum arithmetic kind, size_t row, size_t i, size_t n,
                          float *words) {
    const char *data = (const char *)w->data + row * bytes_of(t, w->in);
    size_t group = w->in / w->groups;
    float scale = 1, zero = 0;
    for (size_t k = 0; k < n; k += STEP) {
        vf step[2];
        if (t == INT4 && (k == 0 || (i + k) % group == 0)) {
            scale = scale_of(w, row, i + k);
            zero = zero_of(w, row, i + k);
        }
        if (k + STEP <= n) load_step(t, data, i + k, step);
        else load_step_part(t, data, i + k, n - k, step);
        for (int j = 0; j < 2 && t == INT4; j++) step[j] = (step[j] - zero) * scale;
        if (kind == FLOATS) memcpy(words + k, step, sizeof step);
        else store_words(kind, step, 1, words + k / 2);
    }
}

void unpack_row(const struct matrix *w, const struct plan *plan, size_t row, size_t i, size_t n, struct block *to,
                size_t r) {
    float *words = to->words + r * PITCH, *scales = to->scales[r];
    switch (plan->kind) {
    case INTEGERS:
        switch (w->type) {
        case INT4: return unpack_integers(w, INT4, w->zero != NULL, plan, row, i, n, words, scales);
        case INT8: return unpack_integers(w, INT8, 0, plan, row, i, n, words, scales);
        default: return unpack_halves(w, plan, row, i, n, words, scales);
        }
    case BFLOATS:
        if (w->type == FP8) return unpack_floats(w, FP8, BFLOATS, row, i, n, words);
        return unpack_floats(w, BF16, BFLOATS, row, i, n, words);
    default:
        switch (w->type) {
        case F32: return unpack_floats(w, F32, FLOATS, row, i, n, words);
        case F16: return unpack_floats(w, F16, FLOATS, row, i, n, words);
        case BF16: return unpack_floats(w, BF16, FLOATS, row, i, n, words);
        case FP8: return unpack_floats(w, FP8, FLOATS, row, i, n, words);
        case INT8: return unpack_floats(w, INT8, FLOATS, row, i, n, words);
        default: return unpack_floats(w, INT4, FLOATS, row, i, n, words);
        }
    }
}
