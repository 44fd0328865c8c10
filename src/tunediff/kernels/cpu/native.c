/* The sparse part of a training step: selection among pre-activations, and sums over the kept (token, latent) pairs; and
   two sums over much memory, of a gradient's squares and of the divergence of logits.

   Every function works on a range of rows [start, stop) that nobody else writes, so the caller may run ranges on any
   number of threads and gets the same bits. Rows are contiguous float32. `lanes` is what one AVX-512 register holds; on
   other machines the compiler splits it. Where it can, one build holds a version of each kernel for AVX-512, for FMA and
   for any x86-64, and the loader of the library picks. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "lanes.h"
#include "threads.h"

/* Goes up whenever a function here changes what it takes. */
int interface(void) { return 14; }

typedef int64_t whole;
typedef struct {
    void (*kernel)(void);
    const whole *given, *edges;
    whole count, parts, next;
} turns;

static void turn(void *data) {
    turns *t = data;
    const whole *g = t->given;
    for (whole p; (p = taken(&t->next)) < t->parts;) {
        const whole from = t->edges[p], to = t->edges[p + 1];
        switch (t->count) {
        case 3: ((void (*)(whole, whole, whole, whole, whole))t->kernel)(g[0], g[1], g[2], from, to); break;
        case 4: ((void (*)(whole, whole, whole, whole, whole, whole))t->kernel)(g[0], g[1], g[2], g[3], from, to); break;
        case 5: ((void (*)(whole, whole, whole, whole, whole, whole, whole))t->kernel)(g[0], g[1], g[2], g[3], g[4], from, to); break;
        case 6: ((void (*)(whole, whole, whole, whole, whole, whole, whole, whole))t->kernel)(g[0], g[1], g[2], g[3], g[4], g[5], from, to); break;
        case 7:
            ((void (*)(whole, whole, whole, whole, whole, whole, whole, whole, whole))t->kernel)(
                g[0], g[1], g[2], g[3], g[4], g[5], g[6], from, to);
            break;
        case 8:
            ((void (*)(whole, whole, whole, whole, whole, whole, whole, whole, whole, whole))t->kernel)(
                g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], from, to);
            break;
        default:
            ((void (*)(whole, whole, whole, whole, whole, whole, whole, whole, whole, whole, whole))t->kernel)(
                g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], from, to);
        }
    }
}

/* Calls a kernel for each of the ranges of rows [edges[p], edges[p + 1]), whichever thread is free. It takes 3 to 9 arguments
   before those two, all pointers or 64-bit integers, which machines that torch runs on pass alike. Returns 0 for another count. */
int spread(void (*kernel)(void), const whole *given, whole count, const whole *edges, whole parts, team *on, whole threads) {
    turns all = {kernel, given, edges, count, parts, 0};
    if (count < 3 || count > 9) return 0;
    on_all(parts > 1 ? on : 0, threads, turn, &all);
    return 1;
}

/* The scaled codes v = pre * weight of each row that exceed the cut of their group of columns
   [bounds[g], bounds[g + 1]), as column and pre-activation, ascending; `count` of each row. Returns how many, or -1
   if `room` does not hold them. */
KERNEL int64_t scan(const float *pre, const float *weight, int64_t F, const int64_t *bounds, const float *cuts, int64_t G,
                    int64_t room, int64_t *column, float *value, int64_t *count, int64_t start, int64_t stop) {
    int64_t n = 0;
    for (int64_t row = start; row < stop; row++) {
        const float *p = pre + row * F;
        int64_t before = n;
        for (int64_t g = 0; g < G; g++) {
            const float cut = cuts[g];
            int64_t c = bounds[g];
            for (; c + LANES <= bounds[g + 1]; c += LANES) {
                uint32_t on = bits_of(OF(p + c) * OF(weight + c) > SPREAD(cut));
                if (!on) continue;
                if (n + LANES > room) return -1;
                for (; on; on &= on - 1, n++) column[n] = c + __builtin_ctz(on), value[n] = p[column[n]];
            }
            if (n + LANES > room) return -1;
            for (; c < bounds[g + 1]; c++) {
                column[n] = c, value[n] = p[c];
                n += p[c] * weight[c] > cut;
            }
        }
        count[row] = n - before;
    }
    return n;
}

/* Of n scaled codes of columns [low, high) those above 0; the codes come in runs spread over all rows, the same ones for
   the same shape. Returns how many. */
int64_t sample(const float *pre, const float *weight, int64_t N, int64_t F, int64_t low, int64_t high, int64_t n, float *out) {
    const int64_t width = high - low, run = width < LANES ? width : LANES;
    uint64_t state = 1;
    int64_t m = 0;
    for (int64_t seen = 0; seen < n; seen += run) {
        state = state * 6364136223846793005u + 1442695040888963407u; /* Knuth's MMIX generator */
        const int64_t row = (int64_t)((state >> 33) % (uint64_t)N);
        state = state * 6364136223846793005u + 1442695040888963407u;
        const int64_t c = low + (int64_t)((state >> 33) % (uint64_t)(width - run + 1));
        for (int64_t i = c; i < c + run; i++) {
            out[m] = pre[row * F + i] * weight[i];
            m += out[m] > 0;
        }
    }
    return m;
}

/* The k-th largest (k >= 1) of the values above 0, or 0 if there are no k; positive floats order as their bits do, so three
   histograms of 11, 11 and 10 bits find it. */
float kth(const float *value, int64_t n, int64_t k) {
    static const int below[] = {21, 10, 0}, wide[] = {11, 11, 10};
    uint32_t histogram[1 << 11], key = 0;
    for (int round = 0; round < 3; round++) {
        const int shift = below[round], known = shift + wide[round]; /* 32 in the first round, when no digit is known */
        const uint32_t last = (1u << wide[round]) - 1;
        memset(histogram, 0, sizeof histogram);
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, value + i, 4);
            histogram[bits >> shift & last] += (value[i] > 0) & ((uint64_t)bits >> known == key); /* no branch: they come in no order */
        }
        int64_t bin = last;
        for (; bin >= 0 && (int64_t)histogram[bin] < k; bin--) k -= histogram[bin];
        if (bin < 0) return 0;
        key = key << wide[round] | (uint32_t)bin;
    }
    float found;
    memcpy(&found, &key, 4);
    return found;
}

/* Of the candidates of N rows, those of a row in [starts[row], ends[row]), the `wanted[g]` largest of each group, of equal ones the
   first, in order: row, column and pre-activation of each, and where each row begins (N + 1). `scratch` holds twice as many
   floats as there are candidates. Returns how many are kept, or -1 if fewer than wanted exceed a group's cut, above which
   all are candidates. */
int64_t keep(const int64_t *column, const float *value, const int64_t *starts, const int64_t *ends, int64_t N, const float *weight,
             const int64_t *bounds, const int64_t *wanted, const float *cuts, int64_t G, float *scratch, int64_t *token,
             int64_t *latent, float *kept, int64_t *begins) {
    int64_t all = 0, n = 0;
    for (int64_t row = 0; row < N; row++)
        for (int64_t i = starts[row]; i < ends[row]; i++) scratch[all++] = value[i] * weight[column[i]];
    float border[G], *scaled = scratch, *own = G > 1 ? scratch + all : scratch;
    int64_t equal[G];
    for (int64_t g = 0; g < G; g++) {
        int64_t m = 0, above = 0;
        for (int64_t row = 0, j = 0; G > 1 && row < N; row++)
            for (int64_t i = starts[row]; i < ends[row]; i++, j++) {
                own[m] = scaled[j];
                m += column[i] >= bounds[g] && column[i] < bounds[g + 1];
            }
        if (G == 1) m = all;
        if (cuts[g] > 0) {
            for (int64_t i = 0; i < m; i++) above += own[i] > cuts[g];
            if (above < wanted[g]) return -1;
        }
        border[g] = wanted[g] < m ? (wanted[g] ? kth(own, m, wanted[g]) : INFINITY) : 0;
        above = 0;
        for (int64_t i = 0; i < m; i++) above += own[i] > border[g];
        equal[g] = wanted[g] - above;
    }
    for (int64_t row = 0; row < N; row++) {
        begins[row] = n;
        for (int64_t i = starts[row], g = 0; i < ends[row]; i++, scaled++) {
            while (column[i] >= bounds[g + 1]) g++;
            const float v = *scaled;
            token[n] = row, latent[n] = column[i], kept[n] = value[i]; /* no branch: half of them stay, in no order */
            n += v > border[g] || (v == border[g] && v > 0 && equal[g]-- > 0);
        }
    }
    begins[N] = n;
    return n;
}

/* out[b] = the sum of squares of block b of `wide` numbers of n, for the blocks [start, stop). */
KERNEL void squares_of(const float *a, int64_t n, int64_t wide, double *out, int64_t start, int64_t stop) {
    enum { BLOCK = 64 * LANES }; /* few enough to add in float32 */
    for (int64_t b = start; b < stop; b++) {
        const int64_t last = (b + 1) * wide < n ? (b + 1) * wide : n;
        double sum = 0;
        for (int64_t at = b * wide; at < last; at += BLOCK) {
            const int64_t end = at + BLOCK < last ? at + BLOCK : last;
            lanes part[4] = {{0}, {0}, {0}, {0}};
            int64_t i = at;
            for (; i + 4 * LANES <= end; i += 4 * LANES)
                for (int k = 0; k < 4; k++) part[k] += OF(a + i + k * LANES) * OF(a + i + k * LANES);
            for (; i < end; i++) sum += (double)a[i] * a[i];
            sum += total((part[0] + part[1]) + (part[2] + part[3]));
        }
        out[b] = sum;
    }
}

/* The pairs ordered by latent, then as they come; `starts` (F + 1) says where each latent begins. */
void bucket(const int64_t *latent, int64_t P, int64_t F, int64_t *order, int64_t *starts) {
    memset(starts, 0, (size_t)(F + 1) * sizeof *starts);
    for (int64_t p = 0; p < P; p++) starts[latent[p] + 1]++;
    for (int64_t f = 0; f < F; f++) starts[f + 1] += starts[f];
    for (int64_t p = 0; p < P; p++) order[starts[latent[p]]++] = p;
    memmove(starts + 1, starts, (size_t)F * sizeof *starts);
    starts[0] = 0;
}

/* out[r] = sum over q in [starts[r], starts[r + 1]) of value[p] * rows[index[p]], p = order[q], or q without an order. */
KERNEL void bag(const int64_t *starts, const int64_t *order, const int64_t *index, const float *value, const float *rows,
                int64_t I, float *restrict out, int64_t start, int64_t stop) {
    for (int64_t r = start; r < stop; r++) {
        float *restrict o = out + r * I;
        memset(o, 0, (size_t)I * sizeof *o);
        for (int64_t q = starts[r]; q < starts[r + 1]; q += 4) {
            const float *from[4];
            float v[4];
            for (int k = 0; k < 4; k++) { /* past the end: the last row again, times 0 */
                const int64_t at = q + k < starts[r + 1] ? q + k : starts[r + 1] - 1, p = order ? order[at] : at;
                from[k] = rows + index[p] * I;
                v[k] = q + k < starts[r + 1] ? value[p] : 0;
            }
            int64_t i = 0;
            for (; i + LANES <= I; i += LANES)
                AT(o + i) += (SPREAD(v[0]) * OF(from[0] + i) + SPREAD(v[1]) * OF(from[1] + i)) +
                             (SPREAD(v[2]) * OF(from[2] + i) + SPREAD(v[3]) * OF(from[3] + i));
            for (; i < I; i++)
                o[i] += (v[0] * from[0][i] + v[1] * from[1][i]) + (v[2] * from[2][i] + v[3] * from[3][i]);
        }
    }
}

/* out[p] = a[r] . b[index[p]] for the pairs p of rows r in [start, stop), p = order[q], or q without an order. */
KERNEL void dot(const int64_t *starts, const int64_t *order, const int64_t *index, const float *a, const float *b,
                int64_t I, float *out, int64_t start, int64_t stop) {
    for (int64_t r = start; r < stop; r++) {
        const float *x = a + r * I;
        for (int64_t q = starts[r]; q < starts[r + 1]; q += 4) {
            const float *to[4];
            float product[4];
            int64_t pair[4];
            const int width = starts[r + 1] - q < 4 ? (int)(starts[r + 1] - q) : 4;
            for (int k = 0; k < 4; k++) {
                pair[k] = order ? order[q + (k < width ? k : 0)] : q + (k < width ? k : 0);
                to[k] = b + index[pair[k]] * I;
            }
            dots(x, to, I, width, product);
            for (int k = 0; k < width; k++) out[pair[k]] = product[k];
        }
    }
}

/* `bag` of rows and `dot` of own[r] with each of them, in one pass: both are wanted of the gradient of what was decoded. */
KERNEL void bag_and_dot(const int64_t *starts, const int64_t *order, const int64_t *index, const float *value,
                        const float *rows, const float *own, int64_t I, float *restrict out, float *restrict product,
                        int64_t start, int64_t stop) {
    for (int64_t r = start; r < stop; r++) {
        const float *x = own + r * I;
        float *restrict o = out + r * I;
        memset(o, 0, (size_t)I * sizeof *o);
        for (int64_t q = starts[r]; q < starts[r + 1]; q += 4) {
            const float *from[4];
            float v[4];
            lanes sum[4] = {{0}, {0}, {0}, {0}};
            const int width = starts[r + 1] - q < 4 ? (int)(starts[r + 1] - q) : 4;
            for (int k = 0; k < 4; k++) {
                const int64_t p = order[q + (k < width ? k : width - 1)];
                from[k] = rows + index[p] * I;
                v[k] = k < width ? value[p] : 0;
            }
            int64_t i = 0;
            for (; i + LANES <= I; i += LANES) {
                const lanes t = OF(x + i), f0 = OF(from[0] + i), f1 = OF(from[1] + i), f2 = OF(from[2] + i), f3 = OF(from[3] + i);
                sum[0] += t * f0, sum[1] += t * f1, sum[2] += t * f2, sum[3] += t * f3;
                AT(o + i) += (SPREAD(v[0]) * f0 + SPREAD(v[1]) * f1) + (SPREAD(v[2]) * f2 + SPREAD(v[3]) * f3);
            }
            float rest[4] = {0};
            for (; i < I; i++) {
                for (int k = 0; k < 4; k++) rest[k] += x[i] * from[k][i];
                o[i] += (v[0] * from[0][i] + v[1] * from[1][i]) + (v[2] * from[2][i] + v[3] * from[3][i]);
            }
            for (int k = 0; k < width; k++) product[order[q + k]] = total(sum[k]) + rest[k];
        }
    }
}

typedef struct { float high, rest; } norm; /* what is taken off logits, the largest first: less is lost */

static inline __attribute__((always_inline)) norm norm_of(const float *x, int64_t V) {
    lanes most = SPREAD(x[0]), sum = {};
    float last = 0, high = x[0];
    int64_t i = 0;
    for (; i + LANES <= V; i += LANES) most = larger(OF(x + i), most);
    for (int k = 0; k < LANES; k++) high = most[k] > high ? most[k] : high;
    for (; i < V; i++) high = x[i] > high ? x[i] : high;
    for (i = 0; i + LANES <= V; i += LANES) sum += power(OF(x + i) - high);
    for (; i < V; i++) last += expf(x[i] - high);
    return (norm){high, logf(total(sum) + last)};
}

/* out[r] = KL(softmax of row r of p || that of q) in nat, of rows of V logits that begin `far` apart; those of p or q begin
   anew after P or Q rows. Log-probabilities need no sum over a row: `sums` says of which to make one (1: p, 2: q). */
KERNEL void divergence(const float *p, const float *q, int64_t V, int64_t P, int64_t Q, int64_t p_far, int64_t q_far,
                       int64_t sums_, float *out, int64_t start, int64_t stop) {
    for (int64_t r = start; r < stop; r++) {
        const float *x = p + r % P * p_far, *y = q + r % Q * q_far;
        const norm a = sums_ & 1 ? norm_of(x, V) : (norm){0, 0}, b = sums_ & 2 ? norm_of(y, V) : (norm){0, 0};
        lanes sum = {};
        float last = 0;
        int64_t i = 0;
        for (; i + LANES <= V; i += LANES) {
            const lanes log_p = OF(x + i) - a.high - a.rest;
            sum += power(log_p) * (log_p - (OF(y + i) - b.high - b.rest));
        }
        for (; i < V; i++) {
            const float log_p = x[i] - a.high - a.rest;
            last += expf(log_p) * (log_p - (y[i] - b.high - b.rest));
        }
        out[r] = total(sum) + last;
    }
}
