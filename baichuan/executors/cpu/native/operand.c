/* Activations as a matrix needs them: smoothed and quantised. */
#include "products.h"

#define LIMIT8    127.0f
#define LIMIT_FP8 448.0f

/* LANES channels from i on: SmoothQuant divides them by their smoothers. */
static vf transformed(const struct matrix *w, const struct rows *x, const void *row, size_t i) {
    vf v = load_part(x->type, row, i, w->in);
    if (w->smoother) {
        vf smoother = load_part(F32, w->smoother, i, w->in);
        return v / (vf)((vi)smoother | ((vi)splat(1) & (smoother == 0))); /* no division by 0 after the last channel */
    }
    return v;
}

/* integers = round(x / scale), in place; returns the scale: *given, or max|x| / 127 without one. */
static float to_integers(float *x, size_t n, const float *given) {
    vf found = {0};
    for (size_t i = 0; i < n; i += LANES) found = larger(found, absolute(LOAD(vf, x + i)));
    float scale = given ? *given : largest(found) / LIMIT8;
    scale = scale > 0 ? scale : 1;
    for (size_t i = 0; i < n; i += LANES) {
        vf integers = nearest(clamp(LOAD(vf, x + i) / scale, LIMIT8));
        memcpy(x + i, &integers, sizeof integers);
    }
    return scale;
}

/* x / scale rounded to e4m3, in place; returns the scale: *given, or max|x| / 448, at least 2^-100, without one. */
static float to_fp8(float *x, size_t n, const float *given) {
    vf found = {0};
    for (size_t i = 0; i < n; i += LANES) found = larger(found, absolute(LOAD(vf, x + i)));
    float scale = given ? *given : fmaxf(largest(found) / LIMIT_FP8, 0x1p-100f);
    for (size_t i = 0; i < n; i += LANES) {
        vf numbers = to_e4m3(clamp(LOAD(vf, x + i) / scale, LIMIT_FP8));
        memcpy(x + i, &numbers, sizeof numbers);
    }
    return scale;
}

static void split_even_odd(float *x, size_t n) {
    for (size_t i = 0; i < n; i += STEP) {
        float step[STEP];
        memcpy(step, x + i, sizeof step);
        for (size_t j = 0; j < LANES; j++) {
            x[i + j] = step[2 * j];
            x[i + LANES + j] = step[2 * j + 1];
        }
    }
}

void prepare_token(const struct matrix *w, const struct rows *x, const float *scales, struct operand *to,
                   size_t token) {
    const char *row = (const char *)x->data + token * bytes_of(x->type, w->in);
    float *floats = to->floats + token * to->stride;
    for (size_t i = 0; i < to->stride; i += LANES) {
        vf v = i < (size_t)w->in ? transformed(w, x, row, i) : (vf){0};
        memcpy(floats + i, &v, sizeof v);
    }
    if (w->w8a8) {
        const float *given = w->input_scale ? w->input_scale : scales ? scales + token : NULL;
        to->scales[token] = to_integers(floats, to->stride, given);
    }
    if (w->type == FP8) to->scales[token] = to_fp8(floats, to->stride, w->input_scale);
    if (w->type == INT4) split_even_odd(floats, to->stride);
}

int make_operand(const struct matrix *w, size_t tokens, struct operand *to) {
    to->stride = up_to(w->in, STEP);
    to->memory = malloc((tokens * (to->stride + 1) + 2 * to->stride) * sizeof(float) + 64);
    to->floats = (float *)up_to((uintptr_t)to->memory, 64);
    to->scales = to->floats + tokens * to->stride;
    to->words = to->scales + tokens;
    return to->memory != NULL;
}
