/* Sums of rows over the kept (token, latent) pairs, a panel at a time: a few columns of all rows, which stay in a core's cache while
   every sum over them is made. Rows are copied into panels first; in float32, or in bfloat16, half as many bytes. */

#include "lanes.h"
#include "rows.h"

enum { SOON = 8 }; /* rows that are read once, one after the other but far apart, are asked for so many ahead */

KERNEL void into_panels(const float *rows, int64_t R, int64_t I, int64_t bytes, int64_t halved, int64_t away, char *out, int64_t start,
                        int64_t stop) {
    const int64_t width = bytes / (halved ? 2 : 4);
    for (int64_t r = start; r < stop; r++)
        for (int64_t p = 0; p * width < I; p++) {
            const float *x = rows + r * I + p * width;
            float end[128];
            if ((p + 1) * width > I) {
                memset(end, 0, sizeof end);
                x = memcpy(end, x, (size_t)(I - p * width) * sizeof *x);
            }
            char *to = out + (p * R + r) * bytes;
            for (int64_t i = 0; i < width; i += halved ? 2 * LANES : LANES)
                if (halved) store((float *)(to + 2 * i), (lanes)(nearest(OF(x + i)) | nearest(OF(x + i + LANES)) << 16), away);
                else store((float *)to + i, OF(x + i), away);
        }
    settle(away);
}

/* Pairs [start, stop) as sums by panels take them: in order, and in fewer bytes. */
void in_order(const int64_t *order, const int64_t *index, const float *value, int32_t *index_out, float *value_out, int64_t start, int64_t stop) {
    for (int64_t q = start; q < stop; q++) {
        const int64_t p = order ? order[q] : q;
        index_out[q] = (int32_t)index[p], value_out[q] = value[p];
    }
}

/* out[order[q]] = the sum of the four parts of product q. */
void out_of_order(const int64_t *order, const float *product, float *out, int64_t start, int64_t stop) {
    for (int64_t q = start; q < stop; q++) {
        const float *part = product + 4 * q;
        out[order[q]] = (part[0] + part[1]) + (part[2] + part[3]);
    }
}

typedef float quarter __attribute__((vector_size(LANES), aligned(4), may_alias));

/* Pairs ordered by sum, and the panel that their rows are in. */
typedef struct {
    const int64_t *starts;
    const int32_t *index;
    const float *value;
    const char *panel;
} sums;

/* Where sums' own rows lie: row r at + r * apart, and if they are in panels, `each` registers of it; the next panel `next` on. */
typedef struct { const char *at; int64_t apart, next; int each; } owns;

static inline __attribute__((always_inline)) void lanes_of(const char *row, int K, int halved, lanes *out) {
    for (int k = 0; k < K; k += halved ? 2 : 1)
        if (halved) {
            const words pairs = *(const words *)(row + 2 * LANES * k);
            out[k] = (lanes)(pairs << 16), out[k + 1] = (lanes)(pairs & 0xffff0000);
        } else out[k] = OF((const float *)row + LANES * k);
}

/* Stores what of K registers lies before the last column, where they are 0, and the sum of their squares. */
static inline __attribute__((always_inline)) void put(const lanes *sum, int K, int64_t columns, int away, float *out, float *square) {
    lanes squares = {};
    for (int k = 0; k < K; k++) squares += sum[k] * sum[k];
    *square = total(squares);
    if (columns < K * LANES) {
        float whole[8 * LANES];
        for (int k = 0; k < K; k++) AT(whole + k * LANES) = sum[k];
        memcpy(out, whole, (size_t)columns * sizeof *out);
    } else
        for (int k = 0; k < K; k++) store(out + k * LANES, sum[k], away);
}

static inline __attribute__((always_inline)) void bag_panel(sums of, int64_t bytes, int K, int halved, int64_t I, int64_t columns, int away,
                                                            float *out, float *square, int64_t start, int64_t stop) {
    for (int64_t r = start; r < stop; r++) {
        lanes sum[8], row[8];
        for (int k = 0; k < K; k++) sum[k] = (lanes){};
        for (int64_t q = of.starts[r]; q < of.starts[r + 1]; q++) {
            lanes_of(of.panel + of.index[q] * bytes, K, halved, row);
            for (int k = 0; k < K; k++) sum[k] += of.value[q] * row[k];
        }
        put(sum, K, columns, away, out + r * I, square + r);
    }
}

/* If `out`, the sums as well as the products. */
static inline __attribute__((always_inline)) void dot_panel(sums of, int64_t bytes, int K, int halved, int64_t I, int64_t columns, int away,
                                                            int more, owns own, float *out, float *square, quarter *product, int64_t start,
                                                            int64_t stop) {
    for (int64_t r = start; r < stop; r++) {
        lanes sum[8], row[8], x[8];
        for (int k = 0; k < K; k++) sum[k] = (lanes){};
        if (own.each) { /* registers of a row in one panel of theirs, which has as many bytes or half as many */
            const char *mine = own.at + r * own.apart;
            lanes_of(mine, K / 2, halved, x);
            if (columns > K / 2 * LANES) lanes_of(own.each == K ? mine + bytes / 2 : mine + own.next, K / 2, halved, x + K / 2);
            else for (int k = K / 2; k < K; k++) x[k] = (lanes){};
        } else {
            const float *mine = (const float *)(own.at + r * own.apart);
            float end[8 * LANES];
            if (columns < K * LANES) {
                memset(end, 0, sizeof end);
                mine = memcpy(end, mine, (size_t)columns * sizeof *mine);
            } else
                for (int k = 0; k < K; k++) __builtin_prefetch((const char *)(mine + k * LANES) + SOON * own.apart);
            for (int k = 0; k < K; k++) x[k] = OF(mine + k * LANES);
        }
        for (int64_t q = of.starts[r]; q < of.starts[r + 1]; q++) {
            lanes dot = {};
            quarter part[4];
            lanes_of(of.panel + of.index[q] * bytes, K, halved, row);
            for (int k = 0; k < K; k++) {
                if (out) sum[k] += of.value[q] * row[k];
                dot += x[k] * row[k];
            }
            memcpy(part, &dot, sizeof part);
            part[0] = (part[0] + part[1]) + (part[2] + part[3]);
            if (more) part[0] += product[q];
            product[q] = part[0];
        }
        if (out) put(sum, K, columns, away, out + r * I, square + r);
    }
}

/* `shape`: R rows in a panel, I columns, `bytes` of each row, whether halved, O sums, whether to store past the caches. out[r] (O, I) = sum
   over q in [starts[r], starts[r + 1]) of value[q] * rows[index[q]], and `squares` (panels, O) of what each
   panel holds of it, for the turns [start, stop): row r of panel p is turn p * O + r. */
KERNEL void bag_panels(const int64_t *starts, const int32_t *index, const float *value, const char *panels, const int64_t *shape, float *out,
                       float *squares, int64_t start, int64_t stop) {
    const int64_t R = shape[0], I = shape[1], bytes = shape[2], halved = shape[3], O = shape[4], away = shape[5], width = bytes / (halved ? 2 : 4);
    while (start < stop) {
        const int64_t p = start / O, end = (p + 1) * O < stop ? (p + 1) * O : stop, first = start - p * O, last = end - p * O;
        const sums of = {starts, index, value, panels + p * R * bytes};
        const int64_t columns = I - p * width;
        float *to = out + p * width, *square = squares + p * O;
        if (halved && bytes == 256) bag_panel(of, 256, 8, 1, I, columns, away, to, square, first, last);
        else if (halved) bag_panel(of, 128, 4, 1, I, columns, away, to, square, first, last);
        else if (bytes == 256) bag_panel(of, 256, 4, 0, I, columns, away, to, square, first, last);
        else bag_panel(of, 128, 2, 0, I, columns, away, to, square, first, last);
        start = end;
    }
    settle(away);
}

static inline __attribute__((always_inline)) void dot_panels_(const int64_t *starts, const int32_t *index, const float *value,
                                                              const char *panels, const int64_t *shape, const char *own, int bags, float *out,
                                                              float *squares, quarter *product, int64_t start, int64_t stop) {
    const int64_t R = shape[0], I = shape[1], bytes = shape[2], halved = shape[3], O = shape[4], away = shape[5], theirs = shape[6];
    const int64_t width = bytes / (halved ? 2 : 4);
    for (int64_t p = 0; p * width < I; p++) {
        const sums of = {starts, index, value, panels + p * R * bytes};
        const int64_t columns = I - p * width;
        const owns at = theirs ? (owns){own + p * O * bytes, theirs, O * theirs, (int)(theirs / (halved ? 32 : 64))}
                               : (owns){own + p * width * 4, 4 * I, 0, 0};
        float *to = bags ? out + p * width : 0, *square = bags ? squares + p * O : 0;
        if (halved && bytes == 256) dot_panel(of, 256, 8, 1, I, columns, away, p > 0, at, to, square, product, start, stop);
        else if (halved) dot_panel(of, 128, 4, 1, I, columns, away, p > 0, at, to, square, product, start, stop);
        else if (bytes == 256) dot_panel(of, 256, 4, 0, I, columns, away, p > 0, at, to, square, product, start, stop);
        else dot_panel(of, 128, 2, 0, I, columns, away, p > 0, at, to, square, product, start, stop);
    }
    settle(away);
}

/* product[q] = own[r] . rows[index[q]] for q in [starts[r], starts[r + 1]) of rows r in [start, stop), in four parts to be added up. Own
   rows are float32 one after the other, or in panels of shape[6] bytes, as many as `rows` are in or half as many. */
KERNEL void dot_panels(const int64_t *starts, const int32_t *index, const char *panels, const int64_t *shape, const char *own, float *product,
                       int64_t start, int64_t stop) {
    dot_panels_(starts, index, 0, panels, shape, own, 0, 0, 0, (quarter *)product, start, stop);
}

/* Both. */
KERNEL void bag_and_dot_panels(const int64_t *starts, const int32_t *index, const float *value, const char *panels, const int64_t *shape,
                               const char *own, float *out, float *squares, float *product, int64_t start, int64_t stop) {
    dot_panels_(starts, index, value, panels, shape, own, 1, out, squares, (quarter *)product, start, stop);
}
