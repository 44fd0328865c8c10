/* Products of float32 matrices, as exact as float32's own, on a processor's tiles of bfloat16 (Intel AMX).

   A float32 number is the sum of three bfloat16 ones, and the product of two bfloat16 ones is exact in the float32 that tiles
   add up in. Of the nine products of parts those smaller than float32's rounding are left out. Weights mostly need fewer: those
   that a model was published with in bfloat16 are one part, in float16 or in 4 to 8 bits with a scale for a block, two. So a
   product takes 3, 5 or 6 of parts, as the weights of its columns need, at seven times float32's rate.

   Tiles take numbers below 2^-126 for 0, so a number below 2^-102 has less than three parts; one beyond 5e33, or an infinite one,
   becomes no number, and so do its products. Every row and column of an answer is added up in the same order, whatever is
   multiplied beside it, by any number of threads. */

#include <stdint.h>
#include <string.h>

#include "threads.h"
#include "tiles.h"

#ifdef HAVE_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifndef HAVE_TILES

int has_tiles(void) { return 0; }

#else

int has_tiles(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return 0;
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

#define TILED __attribute__((target("amx-tile,amx-bf16,avx512f")))
#define INLINE static inline __attribute__((always_inline))

/* 32 numbers come as 16 pairs, number i with number 16 + i: both sides of a
   product do, so its sum is the same, and a pair is the upper halves of two float32 numbers. */
enum { PARTS = 3, NEXT = 2 * TILE, STEP = PARTS * NEXT }; /* numbers from a part to the next one, and from a step of depth */

enum { RUN = 32 }; /* steps of depth that are added up in tiles: more would lose more than torch does */

typedef struct { __m512 low, high; } numbers;

/* 32 numbers, of which `left` are there; others count as 0. */
TILED INLINE numbers numbers_at(const float *x, int64_t left) {
    if (left >= DEEP) return (numbers){_mm512_loadu_ps(x), _mm512_loadu_ps(x + SIDE)};
    const uint32_t there = (1u << left) - 1;
    return (numbers){_mm512_maskz_loadu_ps((__mmask16)there, x), _mm512_maskz_loadu_ps((__mmask16)(there >> SIDE), x + SIDE)};
}

/* The nearest bfloat16 numbers, as float32 (Dekker 1971). */
TILED INLINE __m512 rounded(__m512 x) {
    __m512 much = x * _mm512_set1_ps(65537.0f);
    __asm__("" : "+v"(much)); /* or the compiler makes one operation of it and the next, which rounds nothing */
    return much - (much - x);
}

/* The upper halves of two times sixteen numbers, as pairs. */
TILED INLINE __m512i upper_halves(__m512i low, __m512i high) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(low, 16), high, upper, 0xf8); /* a | (b & c) */
}

/* Numbers in bfloat16, and what that leaves of them. */
TILED INLINE __m512i first_part(numbers *x) {
    const __m512 low = rounded(x->low), high = rounded(x->high);
    x->low -= low, x->high -= high;
    return upper_halves(_mm512_castps_si512(low), _mm512_castps_si512(high));
}

/* What a first part left, in bfloat16: of its 16 bits half are lost. */
TILED INLINE __m512i last_part(numbers x) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    return upper_halves(_mm512_add_epi32(_mm512_castps_si512(x.low), half), _mm512_add_epi32(_mm512_castps_si512(x.high), half));
}

/* Sixteen rows of sixteen pairs into a tile of a product's right side: a row for each pair, a pair for each column. */
TILED INLINE void turned(__m512i r[SIDE], uint16_t *out) {
    __m512i t[SIDE];
    for (int i = 0; i < SIDE; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    for (int i = 0; i < SIDE; i += 4)
        for (int k = 0; k < 2; k++) {
            r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
            r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
        }
    for (int half = 0; half < SIDE; half += SIDE / 2)
        for (int i = half; i < half + 4; i++) {
            t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
            t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        }
    for (int i = 0; i < SIDE / 2; i++) {
        _mm512_store_si512(out + DEEP * i, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_store_si512(out + DEEP * (i + 8), _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    }
}

/* y (M, N) = x (M, K) w (N, K)', rows of x and w `far` apart. Squares of 32 columns go in `ranges` of `widest` at most to the
   threads. Tiles lie by 32 rows or columns, depth, part, 16 of them: the left side's of all rows in `rows`, or, where ranges are
   `few`, each worker's of the 32 rows that it is at; every worker has room for one range's columns in `columns`. */
typedef struct {
    int64_t M, N, K, steps, squares, ranges, widest, few, x_far, w_far;
    const float *x, *w;
    float *y;
    uint16_t *rows, *columns;
    int64_t next, workers;
} job;

static int64_t whole_of(int64_t n, int64_t parts) { return (n + parts - 1) / parts; }

static job dealt(int64_t M, int64_t N, int64_t K, int64_t threads) {
    enum { NEAR = 1200 << 10, /* bytes of columns that stay in a core's own cache while all rows go by (measured) */
           FITS = 320 << 10 }; /* bytes of rows that do beside them: to bring those into tiles twice costs less than to fetch them (measured) */
    job j = {.M = M, .N = N, .K = K, .steps = whole_of(K, DEEP), .squares = whole_of(N, 2 * SIDE)};
    const int64_t least = whole_of(j.squares * j.steps * 2 * TILE * 4, NEAR); /* most weights need two parts of 2 bytes */
    j.ranges = whole_of(least, threads) * threads;
    if (j.ranges > j.squares) j.ranges = j.squares;
    j.widest = whole_of(j.squares, j.ranges);
    j.few = j.ranges <= 2 * threads && j.steps * STEP * 2 <= FITS;
    return j;
}

/* Numbers in the tiles of 32 rows or columns. */
static int64_t line(const job *j) { return j->steps * STEP; }

/* Tiles [first, stop) of sixteen rows. */
TILED static void left_side(const job *j, int64_t first, int64_t stop, uint16_t *out) {
    for (int64_t block = first; block < stop; block++)
        for (int64_t r = 0; r < SIDE; r++) {
            const float *x = j->x + (block * SIDE + r) % j->M * j->x_far; /* past the end any row: nobody asks for its sums */
            uint16_t *o = out + (block / 2 - first / 2) * line(j) + block % 2 * TILE + r * DEEP;
            for (int64_t s = 0; s < j->steps; s++, o += STEP) {
                numbers left = numbers_at(x + s * DEEP, j->K - s * DEEP);
                _mm512_store_si512(o, first_part(&left));
                _mm512_store_si512(o + NEXT, first_part(&left));
                _mm512_store_si512(o + 2 * NEXT, last_part(left));
            }
        }
}

TILED static void left_sides(void *data) {
    job *j = data;
    for (int64_t two; (two = taken(&j->next)) < whole_of(j->M, 2 * SIDE);) left_side(j, 2 * two, 2 * two + 2, j->rows + two * line(j));
}

/* The tiles of sixteen columns; returns how many parts they need. */
TILED static int right_side(const job *j, int64_t first, uint16_t *out) {
    enum { AHEAD = 64 }; /* of a row little is read at a time: the processor would not see what comes next */
    const __m512i none = _mm512_setzero_si512();
    __m512i second = none;
    int third = 0;
    const float *w[SIDE];
    for (int c = 0; c < SIDE; c++) w[c] = j->w + (first + c) % j->N * j->w_far;
    for (int64_t s = 0, left = j->K; s < j->steps; s++, left -= DEEP, out += STEP) {
        __m512i one[SIDE], two[SIDE], rest = none;
        for (int c = 0; c < SIDE; c++) {
            _mm_prefetch((const char *)(w[c] + s * DEEP + AHEAD), _MM_HINT_T0);
            _mm_prefetch((const char *)(w[c] + s * DEEP + AHEAD + SIDE), _MM_HINT_T0);
            numbers x = numbers_at(w[c] + s * DEEP, left);
            one[c] = first_part(&x), two[c] = last_part(x);
            rest = _mm512_or_si512(rest, _mm512_or_si512(_mm512_castps_si512(x.low), _mm512_castps_si512(x.high)));
            second = _mm512_or_si512(second, two[c]);
        }
        turned(one, out);
        rest = _mm512_slli_epi32(rest, 16); /* bits that a second part has no room for */
        if (!_mm512_test_epi32_mask(rest, rest)) {
            turned(two, out + NEXT);
            continue;
        }
        for (int64_t r = 0; !third && r < j->steps; r++) memset(out + (r - s) * STEP + 2 * NEXT, 0, TILE * sizeof *out);
        third = 1;
        for (int c = 0; c < SIDE; c++) {
            numbers x = numbers_at(w[c] + s * DEEP, left);
            first_part(&x), two[c] = first_part(&x), one[c] = last_part(x);
        }
        turned(two, out + NEXT), turned(one, out + 2 * NEXT);
    }
    return third ? 3 : _mm512_test_epi32_mask(second, second) ? 2 : 1;
}

#define EACH(act0, act1, act2, act3) do { act0; act1; act2; act3; } while (0)
#define LEFT(p) do { _tile_loadd(4, a + (p) * NEXT, 64); _tile_loadd(5, a + (p) * NEXT + TILE, 64); } while (0)
#define RIGHT(p) do { _tile_loadd(6, b + (p) * NEXT, 64); _tile_loadd(7, b + (p) * NEXT + TILE, 64); } while (0)
#define ADD EACH(_tile_dpbf16ps(0, 4, 6), _tile_dpbf16ps(1, 4, 7), _tile_dpbf16ps(2, 5, 6), _tile_dpbf16ps(3, 5, 7))
#define STORE(y, below, far) EACH(_tile_stored(0, y, far), _tile_stored(1, y + SIDE, far), \
    _tile_stored(2, y + below, far), _tile_stored(3, y + below + SIDE, far))

/* 32 rows by 32 columns of an answer, of which `rows` and `columns` are there, over some steps of depth; of each the smallest
   products first. They are put into y, or added to it if `more`. */
TILED static void square(const uint16_t *a, const uint16_t *b, int64_t steps, int parts, int more, float *y, int64_t far,
                         int64_t rows, int64_t columns) {
    __asm__ volatile("" ::: "memory"); /* loads of tiles do not say that they read memory */
    EACH(_tile_zero(0), _tile_zero(1), _tile_zero(2), _tile_zero(3));
    for (int64_t s = 0; s < steps; s++, a += STEP, b += STEP) {
        RIGHT(0); LEFT(2); ADD;
        LEFT(1); ADD;
        if (parts > 1) { RIGHT(1); ADD; }
        LEFT(0); ADD;
        if (parts > 2) { RIGHT(2); ADD; }
        if (parts > 1) { RIGHT(0); ADD; }
    }
    if (!more && rows >= 2 * SIDE && columns >= 2 * SIDE) {
        STORE(y, SIDE * far, far * 4);
        return;
    }
    float out[2 * SIDE][2 * SIDE];
    STORE(out[0], 2 * SIDE * SIDE, 2 * SIDE * 4);
    __asm__ volatile("" ::: "memory");
    const int64_t wide = columns < 2 * SIDE ? columns : 2 * SIDE;
    for (int64_t r = 0; r < 2 * SIDE && r < rows; r++)
        for (int64_t c = 0; c < wide; c++) y[r * far + c] = more ? y[r * far + c] + out[r][c] : out[r][c];
}

TILED void tiles_begin(void) {
    static const struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles = {
        1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE}};
    _tile_loadconfig(&tiles);
}

TILED void tiles_end(void) { _tile_release(); }

TILED void square_on_tiles(const uint16_t *a, const uint16_t *b, int64_t far, int64_t steps, int more, float *out) {
    enum { WIDE = 2 * SIDE };
    __asm__ volatile("" ::: "memory");
    if (more) EACH(_tile_loadd(0, out, WIDE * 4), _tile_loadd(1, out + SIDE, WIDE * 4), _tile_loadd(2, out + SIDE * WIDE, WIDE * 4),
                   _tile_loadd(3, out + SIDE * WIDE + SIDE, WIDE * 4));
    else EACH(_tile_zero(0), _tile_zero(1), _tile_zero(2), _tile_zero(3));
    for (int64_t s = 0; s < steps; s++, a += TILE, b += TILE) {
        EACH(_tile_loadd(6, b, 64), _tile_loadd(7, b + far, 64), _tile_loadd(4, a, 64), _tile_loadd(5, a + far, 64));
        ADD;
    }
    STORE(out, SIDE * WIDE, WIDE * 4);
    __asm__ volatile("" ::: "memory");
}

TILED static void products(void *data) {
    job *j = data;
    tiles_begin();
    const int64_t worker = taken(&j->workers);
    uint16_t *own = j->columns + worker * j->widest * line(j);
    for (int64_t range; (range = taken(&j->next)) < j->ranges;) {
        const int64_t from = j->squares * range / j->ranges, to = j->squares * (range + 1) / j->ranges;
        int parts[to - from];
        for (int64_t q = from; q < to; q++) {
            uint16_t *tiles_of = own + (q - from) * line(j);
            const int one = right_side(j, q * 2 * SIDE, tiles_of), other = right_side(j, q * 2 * SIDE + SIDE, tiles_of + TILE);
            parts[q - from] = one > other ? one : other;
            for (int64_t t = 0; one != other && parts[q - from] == 3 && t < j->steps; t++)
                memset(tiles_of + (one < other ? 0 : TILE) + t * STEP + 2 * NEXT, 0, TILE * sizeof *own);
        }
        for (int64_t m = 0; m < j->M; m += 2 * SIDE) {
            uint16_t *rows = j->rows + (j->few ? worker : m / (2 * SIDE)) * line(j);
            if (j->few) left_side(j, m / SIDE, m / SIDE + 2, rows);
            for (int64_t q = from; q < to; q++)
                for (int64_t s = 0; s < j->steps; s += RUN)
                    square(rows + s * STEP, own + (q - from) * line(j) + s * STEP,
                           j->steps - s < RUN ? j->steps - s : RUN, parts[q - from], s > 0, j->y + m * j->N + q * 2 * SIDE, j->N,
                           j->M - m, j->N - q * 2 * SIDE);
        }
    }
    tiles_end();
}

static int64_t lines_of_rows(const job *j, int64_t threads) { return j->few ? threads : whole_of(j->M, 2 * SIDE); }

/* Bytes that `multiply` needs besides. */
int64_t room(int64_t M, int64_t N, int64_t K, int64_t threads) {
    const job j = dealt(M, N, K, threads);
    return 64 + 2 * (lines_of_rows(&j, threads) + threads * j.widest) * line(&j);
}

/* y (M, N) = x (M, K) w (N, K)' by the threads of `on`, or by the caller without them; rows of x and w are `far` apart. */
void multiply(const float *x, const float *w, float *y, int64_t M, int64_t N, int64_t K, int64_t x_far, int64_t w_far, char *space,
              team *on, int64_t threads) {
    job j = dealt(M, N, K, threads);
    j.x = x, j.w = w, j.y = y, j.x_far = x_far, j.w_far = w_far;
    j.rows = (uint16_t *)(space + (64 - (uintptr_t)space % 64) % 64);
    j.columns = j.rows + lines_of_rows(&j, threads) * line(&j);
    if (!j.few) on_all(on, threads, left_sides, &j);
    j.next = 0;
    on_all(on, threads, products, &j);
}

#endif
