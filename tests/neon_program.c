/* One product by the kernels, for a processor that an emulator stands for: numbers in from stdin, y out to stdout. */
#include "products.h"
#include <stdio.h>

static void *read_bytes(size_t n) {
    void *p = n ? aligned_alloc(64, up_to(n, 64)) : NULL;
    if (n && fread(p, 1, n, stdin) != n) exit(1);
    return p;
}

int main(void) {
    int64_t h[11]; /* out, in, groups, type, scale type, w8a8, tokens, type of x, of y, bytes of scale, of `third` */
    if (fread(h, sizeof h, 1, stdin) != 1) return 1;
    struct matrix w = {.out = h[0], .in = h[1], .groups = h[2], .type = h[3], .scale_type = h[4], .w8a8 = h[5]};
    w.data = read_bytes(h[0] * bytes_of(w.type, h[1]));
    w.scale = read_bytes(h[9]);
    void *third = read_bytes(h[10]); /* INT4's zeros, or the scale of the activations */
    w.zero = w.type == INT4 ? third : NULL;
    w.input_scale = w.type == INT4 ? NULL : third;
    struct rows x = {read_bytes(h[6] * bytes_of(h[7], h[1])), h[6], h[7]};
    struct rows y = {malloc(h[6] * bytes_of(h[8], h[0])), h[6], h[8]};
    if (!product(&w, &x, NULL, &y, 1)) return 2;
    size_t bytes = h[6] * bytes_of(h[8], h[0]);
    return fwrite(y.data, 1, bytes, stdout) == bytes ? 0 : 3;
}
