/* A clock that can be wrong: the time of day of a process, shifted by the seconds in a file, at once when that changes.

   cc -shared -fPIC -o clock.so clock.c -ldl;  LD_PRELOAD=clock.so CLOCK_OFFSET=FILE command
   FILE holds one int64 in the machine's order. libfaketime is not used: time.sleep of Python 3.11 fails under it. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t zero, *offset = &zero;
static int (*real_gettime)(clockid_t, struct timespec *);
static int (*real_cond)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
static int (*real_sem)(sem_t *, const struct timespec *);

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("CLOCK_OFFSET");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *map = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, fd, 0);
    if (fd >= 0) close(fd);
    if (map != MAP_FAILED) offset = map;
}

static void *next(const char *name, const char *version) {
    void *found = version ? dlvsym(RTLD_NEXT, name, version) : NULL; /* dlsym would find the one of 2002 */
    return found ? found : dlsym(RTLD_NEXT, name);
}

int clock_gettime(clockid_t id, struct timespec *now) {
    if (!real_gettime) real_gettime = next("clock_gettime", NULL);
    int status = real_gettime(id, now);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) now->tv_sec += *offset;
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec t;
    int status = clock_gettime(CLOCK_REALTIME, &t);
    (void)zone;
    *now = (struct timeval){t.tv_sec, t.tv_nsec / 1000};
    return status;
}

time_t time(time_t *out) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    if (out) *out = t.tv_sec;
    return t.tv_sec;
}

/* deadlines that were worked out from this clock are given to the kernel by its own */
int pthread_cond_timedwait(pthread_cond_t *restrict c, pthread_mutex_t *restrict m, const struct timespec *restrict end) {
    struct timespec t = *end;
    if (!real_cond) real_cond = next("pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!(c->__data.__wrefs & 2)) t.tv_sec -= *offset; /* glibc's mark of a condition on the monotonic clock */
    return real_cond(c, m, &t);
}

int sem_timedwait(sem_t *restrict s, const struct timespec *restrict end) {
    struct timespec t = *end;
    if (!real_sem) real_sem = next("sem_timedwait", NULL);
    t.tv_sec -= *offset;
    return real_sem(s, &t);
}
