/* What a network does to its streams between products, in one pass each. Rows are contiguous float32; ranges [start, stop) of rows or of
   blocks are as in `native.c`. */

#include <math.h>

#include "lanes.h"

/* out = weight * x / sqrt(mean of x * x + epsilon), row by row of I numbers (Zhang and Sennrich 2019, 1910.07467). */
KERNEL void rms_norm(const float *x, const float *weight, const double *epsilon, int64_t I, float *out, int64_t start, int64_t stop) {
    for (int64_t row = start; row < stop; row++) {
        const float *from = x + row * I;
        float *to = out + row * I, last = 0;
        lanes sum[4] = {{0}, {0}, {0}, {0}};
        int64_t i = 0;
        for (; i + 4 * LANES <= I; i += 4 * LANES)
            for (int k = 0; k < 4; k++) sum[k] += OF(from + i + k * LANES) * OF(from + i + k * LANES);
        for (; i + LANES <= I; i += LANES) sum[0] += OF(from + i) * OF(from + i);
        for (; i < I; i++) last += from[i] * from[i];
        const float scale = (float)(1 / sqrt((double)(total((sum[0] + sum[1]) + (sum[2] + sum[3])) + last) / (double)I + *epsilon));
        for (i = 0; i + LANES <= I; i += LANES) AT(to + i) = OF(weight + i) * (OF(from + i) * scale);
        for (; i < I; i++) to[i] = weight[i] * (from[i] * scale);
    }
}

/* x * sigmoid(x). */
static inline __attribute__((always_inline)) lanes gate_of(lanes x) {
    const marks below = x < SPREAD(0);
    const lanes small = power((lanes)((words)x | 0x80000000u)), one = SPREAD(1);
    return x * ((lanes)(((marks)small & below) | ((marks)one & ~below)) / (one + small));
}

/* out = gate * sigmoid(gate) * up (Shazeer 2020, 2002.05202), of n numbers in blocks. */
KERNEL void gated(const float *gate, const float *up, int64_t n, int64_t block, float *out, int64_t start, int64_t stop) {
    const int64_t end = stop * block < n ? stop * block : n;
    int64_t i = start * block;
    for (; i + LANES <= end; i += LANES) AT(out + i) = gate_of(OF(gate + i)) * OF(up + i);
    if (i == end) return;
    float last[LANES] = {0}; /* by the same operations, or bits would hang on what stands beside them */
    memcpy(last, gate + i, (size_t)(end - i) * sizeof *last);
    AT(last) = gate_of(OF(last));
    for (int64_t k = 0; i < end; i++, k++) out[i] = last[k] * up[i];
}

/* What heads of E numbers turn into by the angles of their positions (Su et al. 2021, 2104.09864), numbers i and i + E / 2 together.
   `sizes`: heads H, positions T, E, and how far x's batches, heads and positions and the angles' batches are apart. out lies by batch,
   head, position; so do rows. */
KERNEL void rotated(const float *x, const float *cosine, const float *sine, const int64_t *sizes, float *out, int64_t start, int64_t stop) {
    const int64_t H = sizes[0], T = sizes[1], E = sizes[2], half = E / 2;
    for (int64_t row = start; row < stop; row++) {
        const int64_t t = row % T, h = row / T % H, b = row / T / H;
        const float *low = x + b * sizes[3] + h * sizes[4] + t * sizes[5], *high = low + half;
        const float *c = cosine + b * sizes[6] + t * E, *s = sine + b * sizes[6] + t * E;
        float *to = out + row * E;
        int64_t i = 0;
        for (; i + LANES <= half; i += LANES) {
            const lanes a = OF(low + i), z = OF(high + i);
            AT(to + i) = a * OF(c + i) - z * OF(s + i);
            AT(to + half + i) = z * OF(c + half + i) + a * OF(s + half + i);
        }
        for (; i < half; i++) {
            to[i] = low[i] * c[i] - high[i] * s[i];
            to[half + i] = high[i] * c[half + i] + low[i] * s[half + i];
        }
    }
}
