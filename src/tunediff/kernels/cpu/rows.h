/* Forms in which rows are kept beside their own. */

#include <stdint.h>

/* Tiles [start, stop) of R rows of I numbers in bfloat16, 16 rows each and pair after pair if `turned`, rows past the end being the last
   one again; the length of each row, and of what that took from it. Past the caches
   if `away`, which those that are turned cannot go. */
void pack(const float *rows, int64_t R, int64_t I, int64_t turned, int64_t away, uint16_t *out, float *length, float *lost, int64_t start,
          int64_t stop);

/* Of rows [start, stop) of R rows of I numbers `bytes` (128 or 256) into each panel, R times as many bytes; the last one is filled up
   with 0. If `halved` in bfloat16, of each 32 columns the first and the second 16 by turns. Past the caches if `away`. */
void into_panels(const float *rows, int64_t R, int64_t I, int64_t bytes, int64_t halved, int64_t away, char *out, int64_t start,
                 int64_t stop);

/* out[n] = the sum of squares of the n-th `wide` numbers, for n in [start, stop). */
void squares_of_parts(const float *a, int64_t wide, float *out, int64_t start, int64_t stop);
