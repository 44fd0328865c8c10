/* Tiles of bfloat16: 16 rows of 32 numbers, and who multiplies them. */

#include <stdint.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define HAVE_TILES
#include <immintrin.h>
#endif

enum { SIDE = 16, DEEP = 32, TILE = SIDE * DEEP };

/* Whether the processor has tiles of bfloat16 and the system lets this process use them. */
int has_tiles(void);

#ifdef HAVE_TILES
/* What a thread does before and after it uses tiles. */
void tiles_begin(void);
void tiles_end(void);

/* out[i][j] = a_i . b_j of 32 rows and 32 columns over some steps of depth, or added to it if `more`; their second 16 lie `far` on. */
void square_on_tiles(const uint16_t *a, const uint16_t *b, int64_t far, int64_t steps, int more, float *out);
#endif
