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

#include "lanes.h"
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

/* A side of a product, `far` numbers from one row to the next. In tiles it lies by 32 rows, depth, part (of which there is room for
   `room`), 16 rows; `parts` says how many parts each 32 rows need. */
typedef struct {
    const float *from;
    int64_t rows, deep, far, steps, squares, room;
    uint16_t *tiles;
    int32_t *parts;
} side;

static int64_t whole_of(int64_t n, int64_t parts) { return (n + parts - 1) / parts; }

static side side_of(const float *from, int64_t rows, int64_t deep, int64_t far, int64_t room) {
    return (side){.from = from, .rows = rows, .deep = deep, .far = far, .steps = whole_of(deep, DEEP), .squares = whole_of(rows, 2 * SIDE), .room = room};
}

/* Numbers in the tiles of 32 rows. */
static int64_t line(const side *x) { return x->steps * x->room * NEXT; }

static int64_t header(const side *x) { return whole_of(x->squares * (int64_t)sizeof *x->parts, 64) * 64; }

/* Bytes of so many times 32 rows in tiles. */
static int64_t bytes_of(const side *x, int64_t squares) { return 64 + header(x) + squares * line(x) * (int64_t)sizeof *x->tiles; }

static void put(side *x, char *space) {
    space += (64 - (uintptr_t)space % 64) % 64; /* lines of a cache, which tiles are read by */
    x->parts = (int32_t *)space, x->tiles = (uint16_t *)(space + header(x));
}

/* 32 rows of a left side, which always are three parts; past the end come any rows: nobody asks for their sums. */
TILED static void left_side(const side *x, int64_t square, int64_t at) {
    uint16_t *out = x->tiles + at * line(x);
    for (int64_t r = 0; r < 2 * SIDE; r++) {
        const float *row = x->from + (square * 2 * SIDE + r) % x->rows * x->far;
        uint16_t *o = out + r / SIDE * TILE + r % SIDE * DEEP;
        for (int64_t s = 0; s < x->steps; s++, o += STEP) {
            numbers left = numbers_at(row + s * DEEP, x->deep - s * DEEP);
            _mm512_store_si512(o, first_part(&left));
            _mm512_store_si512(o + NEXT, first_part(&left));
            _mm512_store_si512(o + 2 * NEXT, last_part(left));
        }
    }
}

/* Sixteen rows of a right side; returns how many parts they need. Those that there is no room for are not brought. */
TILED static int sixteen(const side *x, int64_t first, uint16_t *out) {
    enum { AHEAD = 64 }; /* of a row little is read at a time: the processor would not see what comes next */
    const int64_t step = x->room * NEXT;
    const __m512i none = _mm512_setzero_si512();
    __m512i second = none;
    int third = 0;
    const float *row[SIDE];
    for (int c = 0; c < SIDE; c++) row[c] = x->from + (first + c) % x->rows * x->far;
    for (int64_t s = 0, left = x->deep; s < x->steps; s++, left -= DEEP, out += step) {
        __m512i one[SIDE], two[SIDE], rest = none;
        for (int c = 0; c < SIDE; c++) {
            _mm_prefetch((const char *)(row[c] + s * DEEP + AHEAD), _MM_HINT_T0);
            _mm_prefetch((const char *)(row[c] + s * DEEP + AHEAD + SIDE), _MM_HINT_T0);
            numbers n = numbers_at(row[c] + s * DEEP, left);
            one[c] = first_part(&n), two[c] = last_part(n);
            rest = _mm512_or_si512(rest, _mm512_or_si512(_mm512_castps_si512(n.low), _mm512_castps_si512(n.high)));
            second = _mm512_or_si512(second, two[c]);
        }
        turned(one, out);
        rest = _mm512_slli_epi32(rest, 16); /* bits that a second part has no room for */
        const int more = _mm512_test_epi32_mask(rest, rest) != 0;
        if (!more && x->room > 1) turned(two, out + NEXT);
        if (!more) continue;
        if (x->room < PARTS) return PARTS;
        for (int64_t r = 0; !third && r < x->steps; r++) memset(out + (r - s) * step + 2 * NEXT, 0, TILE * sizeof *out);
        third = 1;
        for (int c = 0; c < SIDE; c++) {
            numbers n = numbers_at(row[c] + s * DEEP, left);
            first_part(&n), two[c] = first_part(&n), one[c] = last_part(n);
        }
        turned(two, out + NEXT), turned(one, out + 2 * NEXT);
    }
    return third ? PARTS : _mm512_test_epi32_mask(second, second) ? 2 : 1;
}

TILED static void right_side(const side *x, int64_t square, int64_t at) {
    uint16_t *out = x->tiles + at * line(x);
    const int one = sixteen(x, square * 2 * SIDE, out), other = sixteen(x, square * 2 * SIDE + SIDE, out + TILE);
    x->parts[at] = one > other ? one : other;
    for (int64_t s = 0; one != other && x->parts[at] == PARTS && x->room == PARTS && s < x->steps; s++)
        memset(out + (one < other ? 0 : TILE) + s * STEP + 2 * NEXT, 0, TILE * sizeof *out);
}

#define EACH(act0, act1, act2, act3) do { act0; act1; act2; act3; } while (0)
#define ADD EACH(_tile_dpbf16ps(0, 4, 6), _tile_dpbf16ps(1, 4, 7), _tile_dpbf16ps(2, 5, 6), _tile_dpbf16ps(3, 5, 7))
#define STORE(y, below, far) EACH(_tile_stored(0, y, far), _tile_stored(1, y + SIDE, far), \
    _tile_stored(2, y + below, far), _tile_stored(3, y + below + SIDE, far))

/* What stores tiles falls asleep after half a microsecond without work, and takes a fifth of one to wake: a sixth of a square of
   576 deep (measured). So it is given some now and then: a tile into one line that nobody reads. */
#define AWAKE(line) _tile_stored(0, line, 0)
enum { NAP = 4 }; /* steps of depth */
static _Thread_local float nobodys[SIDE] __attribute__((aligned(64)));

/* Sums that are asked of an answer's rows as logits l, instead of the answer: with p = exp(l - start) and q = exp(other), where `other` is a
   table of log-probabilities whose Q rows begin anew, the sums of p, of p (l - start - other) and of p again, or of q (...) and of q
   if `theirs`, over every `SUMMED` squares of columns. */
typedef struct {
    const float *other, *start;
    int64_t Q, far, theirs;
    float *sums; /* (columns / SUMMED squares, rows, SUMS) */
} softmax;
enum { SUMMED = 8, SUMS = 3 };

/* A square of logits, of which `columns` are there, and the sums of its rows so far. */
typedef struct { const softmax *of; const float *out; int64_t row, column, rows, columns; lanes *now; } pending;

/* Adds one row to them. */
TILED static void add_row(const pending *h, int64_t r) {
    const softmax *t = h->of;
    const uint32_t there = h->columns < 2 * SIDE ? (1u << h->columns) - 1 : 0xffffffff;
    const float *l = h->out + r * 2 * SIDE, *other = t->other + (h->row + r) % t->Q * t->far + h->column;
    lanes *now = h->now + r * SUMS;
    for (int half = 0; r < h->rows && half < 2; half++) {
        const __mmask16 mask = (__mmask16)(there >> half * SIDE);
        const lanes q = (lanes)_mm512_maskz_loadu_ps(mask, other + half * SIDE);
        const lanes own = (lanes)_mm512_load_ps(l + half * SIDE) - SPREAD(t->start[h->row + r]);
        const __mmask16 much = _mm512_cmp_ps_mask((__m512)own, _mm512_set1_ps(88.0f), _CMP_GT_OQ);
        const __m512 p = _mm512_mask_mov_ps((__m512)power(own), much, _mm512_set1_ps(__builtin_inff()));
        const lanes by = t->theirs ? power(q) : (lanes)p;
        now[0] = (lanes)_mm512_mask_add_ps((__m512)now[0], mask, (__m512)now[0], p);
        now[1] = (lanes)_mm512_mask_add_ps((__m512)now[1], mask, (__m512)now[1], (__m512)(by * (own - q)));
        now[2] = (lanes)_mm512_mask_add_ps((__m512)now[2], mask, (__m512)now[2], (__m512)by);
    }
}

/* 32 rows by 32 columns of an answer over some steps of depth, into y, or into `out` where not all are there or sums stand in y
   already; of each step the smallest products first. Of what comes `next` some lines are called for with `each` step. Meanwhile the
   square `before` is added to its sums, if there is one. */
typedef struct { const uint16_t *a, *b, *next; int64_t each, steps; float *y, *out; int64_t b_step, far; const pending *before; } square;

/* The next step's tiles of a part are called for while this one's are multiplied: loads of tiles from the second-level cache and
   products go on one after the other. But weights of one part have room in the fastest cache if rows of the left side go past it, which
   then are not called for (1,000 x 576 x 1,536: 1.6 -> 1.3 ms; all measured). */
#define CALL(line) do { \
    _Pragma("GCC unroll 32") for (int i = 0; i < 2 * SIDE; i++) _mm_prefetch((const char *)((line) + DEEP * i), _MM_HINT_T0); } while (0)
#define CALL_LEFT(p) do { if (parts > 1) CALL(a_next + (p) * NEXT); } while (0)
#define ROWS(tile, from) do { if (parts > 1) _tile_loadd(tile, from, 64); else _tile_stream_loadd(tile, from, 64); } while (0)
#define LEFT(p) do { ROWS(4, a + (p) * NEXT); if (tall) ROWS(5, a + (p) * NEXT + TILE); } while (0)
#define RIGHT(p) do { _tile_loadd(6, b + (p) * NEXT, 64); _tile_loadd(7, b + (p) * NEXT + TILE, 64); } while (0)
#define SUM do { if (tall) ADD; else { _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); } } while (0)

TILED INLINE void add_up(const square *q, const int parts, const int tall) {
    const uint16_t *a = q->a, *b = q->b, *next = q->next;
    float *const spare = nobodys;
    __asm__ volatile("" ::: "memory"); /* loads of tiles do not say that they read memory */
    EACH(_tile_zero(0), _tile_zero(1), _tile_zero(2), _tile_zero(3));
    for (int64_t s = 0; s < q->steps; s++, a += STEP, b += q->b_step) {
        if (s % NAP == 0) AWAKE(spare);
        for (int64_t i = 0; i < q->each; i++, next += DEEP) _mm_prefetch((const char *)next, _MM_HINT_T1);
        for (int r = 0; q->before && s < SIDE && r < 2; r++) add_row(q->before, 2 * s + r);
        for (int i = 0; s < SIDE && i < 4; i++) __builtin_prefetch(q->y + (2 * s + i / 2) * q->far + i % 2 * SIDE, 1, 3);
        const uint16_t *a_next = a + STEP, *b_next = b + q->b_step;
        RIGHT(0); LEFT(2); SUM; CALL_LEFT(2); CALL(b_next);
        LEFT(1); SUM; CALL_LEFT(1);
        if (parts > 1) { RIGHT(1); SUM; CALL(b_next + NEXT); }
        LEFT(0); SUM; CALL_LEFT(0);
        if (parts > 2) { RIGHT(2); SUM; CALL(b_next + 2 * NEXT); }
        if (parts > 1) { RIGHT(0); SUM; }
    }
    if (!q->out) STORE(q->y, SIDE * q->far, q->far * 4);
    else STORE(q->out, 2 * SIDE * SIDE, 2 * SIDE * 4);
    __asm__ volatile("" ::: "memory");
}

TILED static void added_up(const square *q, int parts, int tall) {
    switch (parts * 2 + tall) {
    case 2: add_up(q, 1, 0); break;
    case 3: add_up(q, 1, 1); break;
    case 4: add_up(q, 2, 0); break;
    case 5: add_up(q, 2, 1); break;
    case 6: add_up(q, 3, 0); break;
    case 7: add_up(q, 3, 1); break;
    }
}

/* `out` into y, or added to it if `more`, as far as rows and columns go. */
TILED static void put_down(const float *out, float *y, int64_t far, int64_t rows, int64_t columns, int more) {
    const uint32_t there = columns < 2 * SIDE ? (1u << columns) - 1 : 0xffffffff;
    for (int64_t r = 0; r < 2 * SIDE && r < rows; r++, y += far, out += 2 * SIDE)
        for (int half = 0; half < 2; half++) {
            const __mmask16 mask = (__mmask16)(there >> half * SIDE);
            __m512 sum = _mm512_load_ps(out + half * SIDE);
            if (more) sum += _mm512_maskz_loadu_ps(mask, y + half * SIDE);
            _mm512_mask_storeu_ps(y + half * SIDE, mask, sum);
        }
}

TILED void tiles_begin(void) {
    static const struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles = {
        1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE}};
    _tile_loadconfig(&tiles);
}

TILED void tiles_end(void) { _tile_release(); }

/* Those of b go past the fastest cache, where those of a stay, which many of b are multiplied by: .75 of the time (measured). */
TILED void square_on_tiles(const uint16_t *a, const uint16_t *b, int64_t far, int64_t steps, int more, float *out) {
    enum { WIDE = 2 * SIDE };
    float *const spare = nobodys;
    __asm__ volatile("" ::: "memory");
    if (more) EACH(_tile_loadd(0, out, WIDE * 4), _tile_loadd(1, out + SIDE, WIDE * 4), _tile_loadd(2, out + SIDE * WIDE, WIDE * 4),
                   _tile_loadd(3, out + SIDE * WIDE + SIDE, WIDE * 4));
    else EACH(_tile_zero(0), _tile_zero(1), _tile_zero(2), _tile_zero(3));
    for (int64_t s = 0; s < steps; s++, a += TILE, b += TILE) {
        EACH(_tile_stream_loadd(6, b, 64), _tile_stream_loadd(7, b + far, 64), _tile_loadd(4, a, 64), _tile_loadd(5, a + far, 64));
        if (s % NAP == NAP - 1) AWAKE(spare);
        ADD;
    }
    STORE(out, SIDE * WIDE, WIDE * 4);
    __asm__ volatile("" ::: "memory");
}

/* y (M, N) = x (M, K) w (N, K)', for `strip` squares of w from the `first` on, which are brought into tiles or are kept there. Rows of x
   go in `chunks` that stay in a core's own cache: who works on one brings it for itself, which costs less than to fetch it, and makes
   `groups` of squares, or some of them where others have come to help. Depth is added up in `runs`. */
typedef struct {
    side x, w;
    float *y;
    const softmax *ask; /* instead of y */
    lanes *now; /* sums of what threads are at, of each row */
    int64_t first, strip, runs, chunks, chunk, groups, threads;
    int bring;
    int64_t next, brought, workers; /* what threads share, as `chunks` are */
    struct { int64_t turns, done; } of[];
} job;

static int64_t begin_of(const job *j, int64_t run) { return j->w.steps * run / j->runs; }

/* The left side over one run of depth. */
static side run_of(const job *j, int64_t run) {
    const int64_t begin = begin_of(j, run);
    side x = j->x;
    x.from += begin * DEEP, x.deep -= begin * DEEP, x.steps = begin_of(j, run + 1) - begin;
    return x;
}

/* Rows from the square `top` on, brought as `x` over one run of depth, by squares [from, to) of w. */
TILED static void squares_of(const job *j, const side *x, int64_t run, int64_t top, int64_t rows, int64_t from, int64_t to, lanes *now) {
    enum { FEW = 3 }; /* squares of rows; calling for much in a short time is in the way of what is loaded now (measured) */
    float out[2][2 * SIDE * 2 * SIDE] __attribute__((aligned(64)));
    const softmax *ask = j->ask;
    const int64_t M = j->x.rows, N = j->w.rows, b_step = j->w.room * NEXT, begin = begin_of(j, run);
    const int64_t each = rows < FEW ? 0 : whole_of(b_step / DEEP, rows);
    pending last = {.of = NULL};
    int turn = 0;
    for (int64_t c = from; c < to; c++) {
        const int64_t at = j->bring ? c : j->first + c, column = (j->first + c) * 2 * SIDE;
        const uint16_t *b = j->w.tiles + at * line(&j->w) + begin * b_step;
        for (int64_t r = 0; r < rows; r++, turn ^= 1) {
            const int64_t row = (top + r) * 2 * SIDE;
            const int all = !ask && run == 0 && row + 2 * SIDE <= M && column + 2 * SIDE <= N;
            float *y = ask ? (float *)ask->other + row % ask->Q * ask->far + column : j->y + row * N + column;
            added_up(&(square){x->tiles + r * line(x), b, b + line(&j->w) + r * each * x->steps * DEEP, c + 1 < to ? each : 0, x->steps, y,
                               all ? NULL : out[turn], b_step, ask ? ask->far : N, last.of ? &last : NULL}, j->w.parts[at], row + SIDE < M);
            for (int64_t i = 2 * x->steps; last.of && i < 2 * SIDE; i++) add_row(&last, i);
            if (ask) last = (pending){ask, out[turn], row, column, M - row, N - column, now + r * 2 * SIDE * SUMS};
            else if (!all) put_down(out[turn], y, N, M - row, N - column, run > 0);
        }
    }
    for (int64_t i = 0; last.of && i < 2 * SIDE; i++) add_row(&last, i);
    for (int64_t r = 0; ask && r < rows * 2 * SIDE; r++, now += SUMS) {
        float *sums = ask->sums + ((j->first + from) / SUMMED * M + top * 2 * SIDE + r) * SUMS;
        for (int i = 0; i < SUMS && top * 2 * SIDE + r < M; i++) sums[i] = total(now[i]);
        memset(now, 0, SUMS * sizeof *now);
    }
}

/* Whether all threads work on the same rows: to bring those costs each less than to fetch all of w. */
static int together(const side *w, int64_t threads) {
    enum { MANY = 256 }; /* squares a thread (measured) */
    return w->squares >= MANY * threads;
}

/* The square that a group begins with. */
static int64_t edge(const job *j, int64_t group) {
    if (!j->ask) return j->strip * group / j->groups;
    return group * SUMMED < j->strip ? group * SUMMED : j->strip;
}

TILED static void work(void *data) {
    job *j = data;
    const int64_t all = j->bring && j->chunks > 1 ? j->strip : 0, me = taken(&j->workers) % j->threads;
    for (int64_t i; (i = taken(&j->next)) < all; __atomic_fetch_add(&j->brought, 1, __ATOMIC_RELEASE)) right_side(&j->w, j->first + i, i);
    while (__atomic_load_n(&j->brought, __ATOMIC_ACQUIRE) < all) _mm_pause(); /* others are at their last */
    tiles_begin();
    for (int64_t i = 0; i < j->chunks; i++) {
        const int64_t chunk = (i + (together(&j->w, j->threads) ? 0 : j->chunks * me / j->threads)) % j->chunks;
        const int64_t top = j->x.squares * chunk / j->chunks, rows = j->x.squares * (chunk + 1) / j->chunks - top;
        int64_t *done = &j->of[chunk].done, here = -1;
        lanes *now = j->ask ? j->now + me * j->chunk * 2 * SIDE * SUMS : NULL;
        side own = j->x;
        for (int64_t turn; (turn = taken(&j->of[chunk].turns)) < j->groups * j->runs; __atomic_fetch_add(done, 1, __ATOMIC_RELEASE)) {
            const int64_t run = turn / j->groups, group = turn % j->groups;
            if (run != here) {
                own = run_of(j, run);
                own.tiles += me * j->chunk * line(&j->x);
                for (int64_t r = 0; r < rows; r++) left_side(&own, top + r, r);
                here = run;
            }
            const int64_t from = edge(j, group), to = edge(j, group + 1);
            for (int64_t c = from; j->bring && j->chunks == 1 && run == 0 && c < to; c++) right_side(&j->w, j->first + c, c);
            while (__atomic_load_n(done, __ATOMIC_ACQUIRE) < run * j->groups) _mm_pause(); /* sums of the run before stand in y */
            squares_of(j, &own, run, top, rows, from, to, now);
        }
    }
    tiles_end();
}

/* Squares of w that all rows go by before the next ones come. */
static int64_t strip_of(const side *w) {
    enum { STRIP = 8 << 20 }; /* bytes that stay in the cache that cores share (measured) */
    const int64_t some = STRIP / (line(w) * (int64_t)sizeof *w->tiles);
    return some < 1 ? 1 : some < w->squares ? some : w->squares;
}

/* Bytes that `bring` needs for a right side (N, K) that has no more parts. */
int64_t kept_room(int64_t N, int64_t K, int64_t parts) {
    const side w = side_of(NULL, N, K, 0, parts);
    return bytes_of(&w, w.squares);
}

typedef struct { side w; int64_t next; } bringing;

static void bring_all(void *data) {
    bringing *j = data;
    for (int64_t i; (i = taken(&j->next)) < j->w.squares;) right_side(&j->w, i, i);
}

/* A right side to keep; returns how many parts it needs, and where those are more than there is room for it is not there. */
int64_t bring(const float *w, int64_t N, int64_t K, int64_t far, int64_t parts, char *space, team *on, int64_t threads) {
    bringing j = {.w = side_of(w, N, K, far, parts)};
    put(&j.w, space);
    on_all(on, threads, bring_all, &j);
    int64_t most = 1;
    for (int64_t i = 0; i < j.w.squares; i++) most = j.w.parts[i] > most ? j.w.parts[i] : most;
    return most;
}

static int64_t runs_of(int64_t steps) { return whole_of(steps, RUN); }

/* A left side, with room for the deepest run. */
static side left_of(const float *from, int64_t rows, int64_t deep, int64_t far) {
    side x = side_of(from, rows, deep, far, PARTS);
    x.steps = whole_of(x.steps, runs_of(x.steps));
    return x;
}

/* Squares of rows that are worked on at once. */
static int64_t chunk_of(const side *x, const side *w, int64_t threads) {
    enum { NEAR = 900 << 10, FEW = 4 }; /* bytes that stay in a core's own cache; squares that are worth fetching w for (measured) */
    int64_t some = NEAR / (line(x) * (int64_t)sizeof *x->tiles);
    if (some > x->squares) some = x->squares;
    if (!together(w, threads) && x->squares >= 2 * threads && some > whole_of(x->squares, threads)) some = whole_of(x->squares, threads);
    return some < FEW ? FEW : some;
}

static int64_t room_of_sums(int64_t squares) { return squares * 2 * SIDE * SUMS * (int64_t)sizeof(lanes); }

static int64_t room_of_job(const side *x) { return (int64_t)(sizeof(job) + x->squares * sizeof *((job *)0)->of); }

/* Bytes that `multiply`, or with `sums` `softmax_sums`, needs besides. */
int64_t room(int64_t M, int64_t N, int64_t K, int64_t kept, int64_t sums, int64_t threads) {
    const side x = left_of(NULL, M, K, 0), w = side_of(NULL, N, K, 0, PARTS);
    const int64_t rows = threads * chunk_of(&x, &w, threads);
    return bytes_of(&x, rows) + (kept ? 0 : bytes_of(&w, strip_of(&w))) + room_of_job(&x) + (sums ? room_of_sums(rows) : 0);
}

static void all_of(job *j, char *space, char *kept, team *on) {
    const int64_t threads = j->threads;
    space += room_of_job(&j->x);
    put(&j->x, space);
    j->chunk = chunk_of(&j->x, &j->w, threads), j->chunks = whole_of(j->x.squares, j->chunk);
    space += bytes_of(&j->x, threads * j->chunk);
    put(&j->w, kept ? kept : space);
    if (j->ask) j->now = memset(space, 0, room_of_sums(threads * j->chunk));
    int64_t strip = kept && j->chunks == 1 ? j->w.squares : strip_of(&j->w);
    if (j->ask && strip < j->w.squares) strip = strip < SUMMED ? SUMMED : strip - strip % SUMMED;
    j->runs = runs_of(j->w.steps);
    for (j->first = 0; j->first < j->w.squares; j->first += strip) {
        j->strip = j->w.squares - j->first < strip ? j->w.squares - j->first : strip;
        j->groups = j->ask ? whole_of(j->strip, SUMMED) : threads == 1 ? 1 : j->strip < 8 * threads ? j->strip : 8 * threads;
        j->next = j->brought = j->workers = 0;
        memset(j->of, 0, j->chunks * sizeof *j->of);
        on_all(on, threads, work, j);
    }
}

/* y (M, N) = x (M, K) w (N, K)' by the threads of `on`, or by the caller without them; rows of x and w are `far` apart. Or of w what
   `bring` made of it with room for so many parts. */
void multiply(const float *x, const float *w, char *kept, int64_t parts, float *y, int64_t M, int64_t N, int64_t K, int64_t x_far,
              int64_t w_far, char *space, team *on, int64_t threads) {
    job *j = (job *)space;
    *j = (job){.x = left_of(x, M, K, x_far), .w = side_of(w, N, K, w_far, kept ? parts : PARTS), .y = y, .bring = !kept, .threads = threads};
    all_of(j, space, kept, on);
}

/* What a `softmax` asks of x (M, K) w (N, K)' as logits, of a w that is kept; K is at most the `deepest` that is added up at once. */
void softmax_sums(const float *x, char *kept, int64_t parts, const float *other, int64_t Q, int64_t far, const float *start, int64_t theirs, float *sums,
          int64_t M, int64_t N, int64_t K, int64_t x_far, char *space, team *on, int64_t threads) {
    const softmax asked = {other, start, Q, far, theirs, sums};
    job *j = (job *)space;
    *j = (job){.x = left_of(x, M, K, x_far), .w = side_of(NULL, N, K, 0, parts), .ask = &asked, .threads = threads};
    all_of(j, space, kept, on);
}

/* Numbers of a row that `softmax_sums` takes at most, and columns that it adds up together. */
int64_t deepest(void) { return RUN * DEEP; }
int64_t summed_columns(void) { return SUMMED * 2 * SIDE; }

#endif
