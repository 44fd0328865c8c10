/* Which codes of a batch can be among its largest: all products of tokens and encoder in bfloat16, of which a bit each is kept, and
   then the few that are worth it in float32.

   Both sides are packed once, 16 rows and 32 numbers of depth at a time (a tile): of the encoder row after row, of tokens pair
   of numbers after pair, 16 tokens each. Rows past the end are filled with the first ones again. Tokens are dealt out in
   groups of 32. */

#include <math.h>

#include "lanes.h"
#include "threads.h"
#include "tiles.h"

enum { GROUP = 2 * SIDE, /* rows on either side of a square of products */
       AHEAD = 16,        /* groups of tokens that go by one after the other while 32 rows of the encoder stay in the fastest cache */
       STEPS = 18 };     /* of their depth as much as has room there */

/* -- squares of products ------------------------------------------------------------------------------------------------ */

/* out[i][j] = a_i . b_j of 32 rows and 32 tokens over some steps of depth, or added to it if `more`; their second 16 lie `far` on. */
typedef void squares(const uint16_t *a, const uint16_t *b, int64_t far, int64_t steps, int more, float *out);

KERNEL void square_anywhere(const uint16_t *a, const uint16_t *b, int64_t far, int64_t steps, int more, float *out) {
    for (int row = 0; row < GROUP; row++)
        for (int half = 0; half < 2; half++) {
            const uint16_t *x = a + row / SIDE * far + row % SIDE * DEEP, *y = b + half * far;
            lanes sum = more ? OF(out + row * GROUP + half * SIDE) : (lanes){};
            for (int64_t s = 0; s < steps; s++, x += TILE, y += TILE)
                for (int i = 0; i < SIDE; i++) {
                    const words pairs = *(const words *)(y + i * DEEP);
                    sum += SPREAD(widen(x[2 * i])) * (lanes)(pairs << 16) + SPREAD(widen(x[2 * i + 1])) * (lanes)(pairs & 0xffff0000);
                }
            AT(out + row * GROUP + half * SIDE) = sum;
        }
}

#ifdef HAVE_TILES
/* The same by registers of pairs (AVX-512's bfloat16). */
__attribute__((target("avx512f,avx512bw,avx512bf16"))) static void square_by_pairs(const uint16_t *a, const uint16_t *b, int64_t far,
                                                                                 int64_t steps, int more, float *out) {
    enum { ROWS = 8 };
    for (int row = 0; row < GROUP; row += ROWS) {
        __m512 sum[ROWS][2];
        for (int r = 0; r < ROWS; r++)
            for (int half = 0; half < 2; half++)
                sum[r][half] = more ? _mm512_loadu_ps(out + (row + r) * GROUP + half * SIDE) : _mm512_setzero_ps();
        const uint16_t *x = a + row / SIDE * far + row % SIDE * DEEP, *y = b;
        for (int64_t s = 0; s < steps; s++, x += TILE, y += TILE)
            for (int i = 0; i < SIDE; i++) {
                const __m512bh one = (__m512bh)_mm512_load_si512(y + i * DEEP), other = (__m512bh)_mm512_load_si512(y + far + i * DEEP);
                for (int r = 0; r < ROWS; r++) {
                    int32_t pair;
                    memcpy(&pair, x + r * DEEP + 2 * i, sizeof pair);
                    const __m512bh own = (__m512bh)_mm512_set1_epi32(pair);
                    sum[r][0] = _mm512_dpbf16_ps(sum[r][0], own, one), sum[r][1] = _mm512_dpbf16_ps(sum[r][1], own, other);
                }
            }
        for (int r = 0; r < ROWS; r++)
            for (int half = 0; half < 2; half++) _mm512_storeu_ps(out + (row + r) * GROUP + half * SIDE, sum[r][half]);
    }
}
#endif

enum { ANYWHERE, PAIRS, TILES };
static int by = ANYWHERE;

/* Lets squares be made by no more than this (0 on any machine, 1 by pairs in registers, 2 on tiles); returns by what. */
int squares_by(int most) {
    by = ANYWHERE;
#ifdef HAVE_TILES
    __builtin_cpu_init();
    if (most >= PAIRS && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw")) by = PAIRS;
#endif
    if (most >= TILES && has_tiles()) by = TILES;
    return by;
}

static squares *squares_begin(void) {
#ifdef HAVE_TILES
    if (by == TILES) return tiles_begin(), square_on_tiles;
    if (by == PAIRS) return square_by_pairs;
#endif
    return square_anywhere;
}

static void squares_end(void) {
#ifdef HAVE_TILES
    if (by == TILES) tiles_end();
#endif
}

/* -- what goes into them ------------------------------------------------------------------------------------------------ */

static int64_t steps_of(int64_t I) { return (I + DEEP - 1) / DEEP; }

/* A tile whose rows are 16 rows of 16 pairs turned into one of 16 pairs of 16 rows. */
static void turn_tile(uint16_t *tile) {
    uint32_t from[SIDE][SIDE], to[SIDE][SIDE];
    memcpy(from, tile, sizeof from);
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) to[j][i] = from[i][j];
    memcpy(tile, to, sizeof to);
}

/* Sixteen numbers in the nearest bfloat16; adds up their squares, and those of what that takes from them. */
static inline __attribute__((always_inline)) void shorten(lanes v, uint16_t *to, lanes *squares, lanes *rests) {
    const words bits = (words)v, near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const lanes rest = v - (lanes)(near << 16);
    *(halves *)to = __builtin_convertvector(near, halves);
    *squares += v * v;
    *rests += rest * rest;
}

/* Tiles [start, stop) of R rows of I numbers in bfloat16, pair after pair if `turned`; the length of each row, and of what that took
   from it. */
KERNEL void pack(const float *a, int64_t R, int64_t I, int64_t turned, uint16_t *out, float *length, float *lost, int64_t start,
                 int64_t stop) {
    const int64_t steps = steps_of(I);
    for (int64_t block = start; block < stop; block++) {
        uint16_t *tiles = out + block * steps * TILE;
        for (int row = 0; row < SIDE; row++) {
            const float *x = a + (block * SIDE + row) % R * I;
            uint16_t *to = tiles + row * DEEP;
            lanes squares[2] = {{0}, {0}}, rests[2] = {{0}, {0}};
            int64_t i = 0;
            for (; i + DEEP <= I; i += DEEP, to += TILE)
                for (int half = 0; half < 2; half++) shorten(OF(x + i + half * SIDE), to + half * SIDE, squares + half, rests + half);
            if (i < I) {
                float end[DEEP] = {0}; /* filled up with zeros */
                memcpy(end, x + i, (size_t)(I - i) * sizeof *x);
                for (int half = 0; half < 2; half++) shorten(OF(end + half * SIDE), to + half * SIDE, squares + half, rests + half);
            }
            length[block * SIDE + row] = sqrtf(total(squares[0] + squares[1]));
            lost[block * SIDE + row] = sqrtf(total(rests[0] + rests[1]));
        }
        for (int64_t s = 0; turned && s < steps; s++) turn_tile(tiles + s * TILE);
    }
}

/* -- what they are asked ------------------------------------------------------------------------------------------------ */

/* Scaled codes of columns [low, high), from one square of products in each turn [start, stop), anywhere among all tokens, the same ones for
   the same shape: 8 columns of 32 tokens. What is below 0 counts as 0, and -1 stands where there is no code. */
void sample_squares(const uint16_t *encoder, const uint16_t *tokens, const float *weight, const float *bias, int64_t N, int64_t steps,
                    int64_t low, int64_t high, float *out, int64_t start, int64_t stop) {
    enum { COLUMNS = 8 };
    float square[GROUP * GROUP] __attribute__((aligned(64)));
    squares *of = squares_begin();
    for (int64_t turn = start; turn < stop; turn++) {
        uint64_t state = (uint64_t)turn * 2862933555777941757u + 3037000493u;
        state ^= state >> 29, state *= 6364136223846793005u; /* Knuth's MMIX generator, from another place each turn */
        const int64_t group = (int64_t)((state >> 33) % (uint64_t)((N + GROUP - 1) / GROUP));
        state = state * 6364136223846793005u + 1442695040888963407u;
        const int64_t first = (low + (int64_t)((state >> 33) % (uint64_t)(high - low))) / COLUMNS * COLUMNS, at = first / GROUP;
        of(encoder + at * GROUP * steps * DEEP, tokens + group * GROUP * steps * DEEP, SIDE * steps * DEEP, steps, 0, square);
        float *o = out + turn * COLUMNS * GROUP;
        for (int64_t f = first; f < first + COLUMNS; f++)
            for (int64_t j = 0; j < GROUP; j++, o++) {
                const int there = f >= low && f < high && group * GROUP + j < N;
                const float code = there ? square[f % GROUP * GROUP + j] * weight[f] + bias[f] : -1;
                *o = !there || code > 0 ? code : 0;
            }
    }
    squares_end();
}

/* For tokens of the groups [start, stop) one bit for each column (F, a multiple of 32) whose product could exceed need[column], being
   off by no more than reach[token] * margin[column]: a word for every group and column, token 32 g + i its bit i. How
   many there are of each token. */
KERNEL void look(const uint16_t *encoder, const uint16_t *tokens, int64_t steps, int64_t F, const float *need, const float *margin,
                 const float *reach, uint32_t *bit, int32_t *count, int64_t start, int64_t stop) {
    const int64_t far = SIDE * steps * DEEP;
    squares *of = squares_begin();
    for (int64_t from = start; from < stop; from += AHEAD) {
        const int64_t to = from + AHEAD < stop ? from + AHEAD : stop;
        float product[AHEAD][GROUP * GROUP] __attribute__((aligned(64)));
        memset(count + from * GROUP, 0, (size_t)((to - from) * GROUP) * sizeof *count);
        for (int64_t f = 0; f < F; f += GROUP)
            for (int64_t s = 0; s < steps; s += STEPS)
                for (int64_t g = from; g < to; g++) {
                    float *p = product[g - from];
                    of(encoder + f / SIDE * far + s * TILE, tokens + 2 * g * far + s * TILE, far, steps - s < STEPS ? steps - s : STEPS, s > 0, p);
                    if (s + STEPS < steps) continue;
                    const lanes one = OF(reach + g * GROUP), other = OF(reach + g * GROUP + SIDE);
                    marks first = {}, second = {};
                    for (int i = 0; i < GROUP; i++, p += GROUP) {
                        const marks a = OF(p) + one * SPREAD(margin[f + i]) > SPREAD(need[f + i]);
                        const marks b = OF(p + SIDE) + other * SPREAD(margin[f + i]) > SPREAD(need[f + i]);
                        first -= a, second -= b;
                        bit[g * F + f + i] = bits_of(a) | bits_of(b) << SIDE;
                    }
                    int32_t *c = count + g * GROUP;
                    for (int i = 0; i < SIDE; i++) c[i] += first[i], c[SIDE + i] += second[i];
                }
    }
    squares_end();
}

/* Of tokens of the groups [start, stop) the codes that have a bit and exceed the cut, each token's in the order of columns from
   next[token] on, which goes up: the column and x . w + bias. `of` has F biases, then F scales, then F cuts of scaled codes; bits have
   room for whole groups of columns. */
KERNEL void measure(const uint32_t *bit, const float *x, const float *w, const float *of, int64_t I, int64_t F, int64_t *next,
                    int64_t *column, float *value, int64_t start, int64_t stop) {
    const int64_t columns = (F + GROUP - 1) / GROUP * GROUP;
    for (int64_t from = start; from < stop; from += AHEAD) {
        const int64_t to = from + AHEAD < stop ? from + AHEAD : stop;
        for (int64_t f = 0; f < F; f++) {
            int64_t token[AHEAD * GROUP];
            int all = 0;
            for (int64_t g = from; g < to; g++)
                for (uint32_t on = bit[g * columns + f]; on; on &= on - 1) token[all++] = g * GROUP + __builtin_ctz(on);
            const float *own = w + f * I;
            for (int q = 0; q < all; q += 4) {
                const float *other[4];
                float product[4];
                const int wide = all - q < 4 ? all - q : 4;
                for (int k = 0; k < 4; k++) other[k] = x + token[q + (k < wide ? k : 0)] * I;
                dots(own, other, I, wide, product);
                for (int k = 0; k < wide; k++) {
                    const float code = product[k] + of[f];
                    int64_t *at = next + token[q + k];
                    column[*at] = f, value[*at] = code;
                    *at += code * of[F + f] > of[2 * F + f];
                }
            }
        }
    }
}
