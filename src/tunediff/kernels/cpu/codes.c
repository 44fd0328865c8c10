/* Which codes of a batch can be among its largest: all products of tokens and encoder in bfloat16, of which a bit each is kept, and
   then the few that are worth it in float32. Or, who is content with bfloat16, those products that are large themselves.

   Both sides are packed once, 16 rows and 32 numbers of depth at a time (a tile): of the encoder row after row, of tokens pair
   of numbers after pair, 16 tokens each. Rows past the end are filled with the last one again. Tokens are dealt out in
   groups of 32. */

#include <math.h>

#include "lanes.h"
#include "rows.h"
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
static inline __attribute__((always_inline)) halves shorten(lanes v, lanes *squares, lanes *rests) {
    const words near = nearest(v);
    const lanes rest = v - (lanes)(near << 16);
    *squares += v * v;
    *rests += rest * rest;
    return __builtin_convertvector(near, halves);
}

static inline __attribute__((always_inline)) void shorten_both(const float *x, int away, uint16_t *to, lanes *squares, lanes *rests) {
    const halves both[2] = {shorten(OF(x), squares, rests), shorten(OF(x + SIDE), squares + 1, rests + 1)};
    lanes v;
    memcpy(&v, both, sizeof v);
    store((float *)to, v, away);
}

KERNEL void pack(const float *a, int64_t R, int64_t I, int64_t turned, int64_t away, uint16_t *out, float *length, float *lost,
                 int64_t start, int64_t stop) {
    const int64_t steps = steps_of(I);
    for (int64_t block = start; block < stop; block++) {
        uint16_t *tiles = out + block * steps * TILE;
        for (int row = 0; row < SIDE; row++) {
            const float *x = a + (block * SIDE + row < R ? block * SIDE + row : R - 1) * I;
            uint16_t *to = tiles + row * DEEP;
            lanes squares[2] = {{0}, {0}}, rests[2] = {{0}, {0}};
            int64_t i = 0;
            for (; i + DEEP <= I; i += DEEP, to += TILE)
                shorten_both(x + i, away, to, squares, rests);
            if (i < I) {
                float end[DEEP] = {0}; /* filled up with zeros */
                memcpy(end, x + i, (size_t)(I - i) * sizeof *x);
                shorten_both(end, away, to, squares, rests);
            }
            length[block * SIDE + row] = sqrtf(total(squares[0] + squares[1]));
            lost[block * SIDE + row] = sqrtf(total(rests[0] + rests[1]));
        }
        for (int64_t s = 0; turned && s < steps; s++) turn_tile(tiles + s * TILE);
    }
    settle(away);
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

/* For columns [start, stop) of F how many tokens of all groups have a bit. */
void count_bits(const uint32_t *bit, int64_t groups, int64_t F, int64_t *count, int64_t start, int64_t stop) {
    memset(count + start, 0, (size_t)(stop - start) * sizeof *count);
    for (int64_t g = 0; g < groups; g++)
        for (int64_t f = start; f < stop; f++) count[f] += __builtin_popcount(bit[g * F + f]);
}

/* Which they are, those of a column from next[column] on, which goes up. */
void list_bits(const uint32_t *bit, int64_t groups, int64_t F, int64_t *next, int32_t *token, int64_t start, int64_t stop) {
    for (int64_t g = 0; g < groups; g++)
        for (int64_t f = start; f < stop; f++)
            for (uint32_t on = bit[g * F + f]; on; on &= on - 1) token[next[f]++] = (int32_t)(g * GROUP + __builtin_ctz(on));
}

/* Of candidates ordered by column and then token, [starts[f], starts[f + 1]) those of column f, with their tokens and products in four
   parts: the codes product + bias that, scaled, exceed their column's cut, those of each token in [start, stop) in the order of columns from
   next[token] on, which goes up. `of` has F biases, then F scales, then F cuts. */
void hand_out(const int64_t *starts, const int32_t *token, const float *product, const float *of, int64_t F, int64_t *next, int64_t *column,
              float *value, int64_t start, int64_t stop) {
    for (int64_t f = 0; f < F; f++)
        for (int64_t q = starts[f]; q < starts[f + 1] && token[q] < stop; q++) {
            if (token[q] < start) continue;
            const float *part = product + 4 * q, code = ((part[0] + part[1]) + (part[2] + part[3])) + of[f];
            int64_t *at = next + token[q];
            column[*at] = f, value[*at] = code;
            *at += code * of[F + f] > of[2 * F + f];
        }
}

/* Of tokens of the groups [start, stop) the codes product + bias that, scaled, exceed their column's cut, as column * 32 + token of the
   group (32 bits) and value, in the order of columns. `of` has F biases, then F scales, then F cuts, those past the last column
   infinite; `given` is the number of tokens, steps, F (a multiple of 32) and for how many codes each group has room. How many there
   are of each token, and of each group, whether or not there is room. */
KERNEL void gather(const uint16_t *encoder, const uint16_t *tokens, const int64_t *given, const float *of, uint32_t *found, int32_t *count,
                   int64_t *all, int64_t start, int64_t stop) {
    const int64_t N = given[0], steps = given[1], F = given[2], room = given[3], far = SIDE * steps * DEEP;
    squares *multiply = squares_begin();
    for (int64_t from = start; from < stop; from += AHEAD) {
        const int64_t to = from + AHEAD < stop ? from + AHEAD : stop;
        float product[AHEAD][GROUP * GROUP] __attribute__((aligned(64)));
        memset(count + from * GROUP, 0, (size_t)((to - from) * GROUP) * sizeof *count);
        memset(all + from, 0, (size_t)(to - from) * sizeof *all);
        for (int64_t f = 0; f < F; f += GROUP)
            for (int64_t s = 0; s < steps; s += STEPS)
                for (int64_t g = from; g < to; g++) {
                    float *p = product[g - from];
                    multiply(encoder + f / SIDE * far + s * TILE, tokens + 2 * g * far + s * TILE, far, steps - s < STEPS ? steps - s : STEPS, s > 0, p);
                    if (s + STEPS < steps) continue;
                    const uint32_t there = N - g * GROUP < GROUP ? (1u << (N - g * GROUP)) - 1 : ~0u;
                    int64_t n = all[g];
                    for (int64_t i = f; i < f + GROUP; i++, p += GROUP) {
                        const lanes bias = SPREAD(of[i]), scale = SPREAD(of[F + i]), cut = SPREAD(of[2 * F + i]);
                        const lanes one = OF(p) + bias, other = OF(p + SIDE) + bias;
                        uint32_t on = (bits_of(one * scale > cut) | bits_of(other * scale > cut) << SIDE) & there;
                        for (; on; on &= on - 1, n++) {
                            const int token = __builtin_ctz(on);
                            const float code = p[token] + of[i];
                            count[g * GROUP + token]++;
                            if (n >= room) continue;
                            found[2 * (g * room + n)] = (uint32_t)(i * GROUP + token);
                            memcpy(found + 2 * (g * room + n) + 1, &code, sizeof code);
                        }
                    }
                    all[g] = n;
                }
    }
    squares_end();
}

/* What `gather` found of the groups [start, stop), each token's from next[token] on, which goes up. */
void sort_out(const uint32_t *found, int64_t room, const int64_t *all, int64_t *next, int64_t *column, float *value, int64_t start,
              int64_t stop) {
    for (int64_t g = start; g < stop; g++)
        for (const uint32_t *at = found + 2 * g * room, *end = at + 2 * all[g]; at < end; at += 2) {
            const int64_t to = next[g * GROUP + at[0] % GROUP]++;
            column[to] = at[0] / GROUP;
            memcpy(value + to, at + 1, sizeof *value);
        }
}
