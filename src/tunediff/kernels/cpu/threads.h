/* Who runs a kernel: one thread, or a team of them that take turns. */

#include <stdint.h>

/* Runs a function on every thread of a team, as OpenMP's GOMP_parallel does. */
typedef void team(void (*run)(void *), void *data, unsigned threads, unsigned flags);

static inline void on_all(team *on, int64_t threads, void (*run)(void *), void *data) {
    if (on && threads > 1) on(run, data, (unsigned)threads, 0);
    else run(data);
}

/* The next turn, from 0 up; each is somebody's once. */
static inline int64_t taken(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }
