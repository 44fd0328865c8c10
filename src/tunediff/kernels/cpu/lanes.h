/* Registers of numbers, for any machine: `lanes` is what one AVX-512 register holds; on others the compiler splits it. Where it can,
   one build holds a version of each KERNEL for AVX-512, for FMA and for any x86-64, and the loader of the library picks. */

#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#if defined(__x86_64__) && defined(__linux__) && defined(__has_attribute) && !defined(__clang__) /* which calls registers of one an error */
#if __has_attribute(target_clones)
#define KERNEL __attribute__((target_clones("avx512f", "fma", "default")))
#endif
#endif
#ifndef KERNEL
#define KERNEL
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bits are taken from bytes in little-endian order"
#endif

#ifdef __GNUC__
#pragma GCC diagnostic ignored "-Wpsabi" /* registers are passed to inlined functions only */
#endif

#define LANES 16
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define AT(p) (*(lanes *)(p))
#define OF(p) (*(const lanes *)(p))
#define SPREAD(x) ((lanes){} + (x))

typedef int32_t marks __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t bytes __attribute__((vector_size(LANES)));

static inline __attribute__((always_inline)) float total(lanes x) {
    float sum[8];
    for (int i = 0; i < 8; i++) sum[i] = x[i] + x[i + 8];
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

/* Stores sixteen numbers; past the caches if `away`, as nobody will ask for them soon, and then on a multiple of 16 bytes. */
static inline __attribute__((always_inline)) void store(float *to, lanes v, int away) {
#ifdef __SSE2__
    if (away) {
        __m128 part[4];
        memcpy(part, &v, sizeof part);
        for (int j = 0; j < 4; j++) _mm_stream_ps(to + 4 * j, part[j]);
        return;
    }
#endif
    (void)away;
    AT(to) = v;
}

/* What comes before whoever else may read what went past the caches. */
static inline void settle(int away) {
#ifdef __SSE2__
    if (away) _mm_sfence();
#endif
    (void)away;
}

/* The products of x with the first `wide` of four rows of I numbers; always added up in the same order. */
static inline __attribute__((always_inline)) void dots(const float *x, const float *const rows[4], int64_t I, int wide, float *out) {
    lanes sum[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + LANES <= I; i += LANES) {
        const lanes t = OF(x + i);
        for (int k = 0; k < 4; k++) sum[k] += t * OF(rows[k] + i);
    }
    for (int k = 0; k < wide; k++) {
        float rest = 0;
        for (int64_t j = i; j < I; j++) rest += x[j] * rows[k][j];
        out[k] = total(sum[k]) + rest;
    }
}

/* One bit a lane, of lanes that are 0 or -1; lane 0 the lowest. */
static inline __attribute__((always_inline)) uint32_t bits_of(marks on) {
    const bytes narrow = __builtin_convertvector(on, bytes);
#ifdef __SSE2__
    return (uint32_t)_mm_movemask_epi8((__m128i)narrow);
#else
    uint64_t part[2];
    memcpy(part, &narrow, sizeof part);
    uint32_t out = 0;
    for (int i = 0; i < 2; i++) /* the lowest bit of each byte, moved to the top one */
        out |= (uint32_t)(((part[i] & 0x0101010101010101u) * 0x0102040810204080u) >> 56) << 8 * i;
    return out;
#endif
}

static inline __attribute__((always_inline)) float widen(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

/* The nearest bfloat16, of two as near the even one. */
static inline __attribute__((always_inline)) words nearest(lanes v) {
    const words bits = (words)v;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static inline __attribute__((always_inline)) lanes larger(lanes a, lanes b) {
    const marks above = a > b;
    return (lanes)(((marks)a & above) | ((marks)b & ~above));
}

/* e^x for x <= 88 to 2 units in the last place; 0 from -87 down, so that a logit of -inf is as loud as in torch (0 * inf). */
static inline __attribute__((always_inline)) lanes power(lanes x) {
    const marks some = x > SPREAD(-87.0f);
    x = larger(x, SPREAD(-87.0f));
    const lanes magic = SPREAD(0x1.8p23f), shifted = x * 1.44269504f + magic, n = shifted - magic;
    const lanes r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts, the first exact */
    lanes sum = SPREAD(1.0f / 5040);
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1;
    sum = sum * r + 1;
    return (lanes)(((words)sum + ((words)shifted << 23)) & (words)some);
}
