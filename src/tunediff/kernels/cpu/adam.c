/* A step of Adam on the rows of a matrix; and what is kept of those rows in other forms, made anew while a core's cache holds them. */

#include <math.h>

#include "lanes.h"
#include "rows.h"

enum { TURN = 32 }; /* rows */

/* `numbers`: what the gradient is multiplied by, 1 - beta1, beta2, 1 - beta2, the step over the first bias, one over the second one's
   root, and epsilon. `kept`, each only if it is not 0: tiles of the rows, their lengths and what rounding took (see `pack`); panels, bytes of a row
   in one, whether halved (see `into_panels`); sums of squares, of how many parts of each row. Of R rows of I numbers (`shape`) the turns
   [start, stop) of 32 rows. */
KERNEL void adam(float *restrict value, const float *restrict grad, float *restrict mean, float *restrict square, const int64_t *shape,
                 const float *numbers, const int64_t *kept, int64_t start, int64_t stop) {
    const int64_t R = shape[0], I = shape[1], parts = kept[7];
    const float scale = numbers[0], some = numbers[1], most = numbers[2], rest = numbers[3], step = numbers[4], root = numbers[5], epsilon = numbers[6];
    for (int64_t turn = start; turn < stop; turn++) {
        const int64_t first = turn * TURN, last = first + TURN < R ? first + TURN : R;
        for (int64_t i = first * I; i < last * I; i++) {
            const float g = grad[i] * scale, m = mean[i] + (g - mean[i]) * some, s = square[i] * most + g * (g * rest);
            mean[i] = m, square[i] = s;
            value[i] -= step * m / (sqrtf(s) * root + epsilon);
        }
        if (kept[0]) pack(value, R, I, 0, 1, (uint16_t *)kept[0], (float *)kept[1], (float *)kept[2], 2 * turn, 2 * turn + 2);
        if (kept[3]) into_panels(value, R, I, kept[4], kept[5], 1, (char *)kept[3], first, last);
        if (kept[6]) squares_of_parts(value, I / parts, (float *)kept[6], first * parts, last * parts);
    }
}

KERNEL void squares_of_parts(const float *a, int64_t wide, float *out, int64_t start, int64_t stop) {
    for (int64_t n = start; n < stop; n++) {
        const float *x = a + n * wide;
        lanes sum[2] = {{0}, {0}};
        float rest = 0;
        int64_t i = 0;
        for (; i + 2 * LANES <= wide; i += 2 * LANES) sum[0] += OF(x + i) * OF(x + i), sum[1] += OF(x + i + LANES) * OF(x + i + LANES);
        for (; i < wide; i++) rest += x[i] * x[i];
        out[n] = total(sum[0] + sum[1]) + rest;
    }
}
