/* A disk that lacks something, for what lies below the folder ODD_DIR.

   cc -shared -fPIC -o odd.so odd.c -ldl;  LD_PRELOAD=odd.so ODD=flock,dirsync,chmod,mmap,rmdir,rename,eio ODD_DIR=/x command
   flock: no locks; dirsync: no fsync of folders; chmod: no modes; mmap: files cannot be mapped; rmdir: a folder that is
   called .tmp-... is never empty; rename: none of folders; eio: the first opening of state.json in the folder ODD_EIO fails. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

static int lacks(const char *what, const char *path) {
    const char *odd = getenv("ODD"), *dir = getenv("ODD_DIR");
    return odd && dir && path && strstr(odd, what) && !strncmp(path, dir, strlen(dir));
}

static int fd_lacks(const char *what, int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return lacks(what, path);
}

static int fails(int number) { errno = number; return -1; }

int flock(int fd, int how) { return fd_lacks("flock", fd) ? fails(ENOSYS) : REAL(flock)(fd, how); }

int fsync(int fd) {
    struct stat s;
    if (fd_lacks("dirsync", fd) && !fstat(fd, &s) && S_ISDIR(s.st_mode)) return fails(EINVAL);
    return REAL(fsync)(fd);
}

int chmod(const char *path, mode_t mode) { return lacks("chmod", path) ? fails(EPERM) : REAL(chmod)(path, mode); }

int fchmodat(int at, const char *path, mode_t mode, int flags) {
    return lacks("chmod", path) ? fails(EPERM) : REAL(fchmodat)(at, path, mode, flags);
}

void *mmap(void *at, size_t size, int prot, int flags, int fd, off_t offset) {
    if (fd >= 0 && fd_lacks("mmap", fd)) { errno = ENODEV; return MAP_FAILED; }
    return REAL(mmap)(at, size, prot, flags, fd, offset);
}

void *mmap64(void *at, size_t size, int prot, int flags, int fd, off64_t offset) {
    return mmap(at, size, prot, flags, fd, offset);
}

static int kept(const char *path) {
    const char *name = strrchr(path, '/');
    return !strncmp(name ? name + 1 : path, ".tmp-", 5);
}

int rmdir(const char *path) {
    return kept(path) && lacks("rmdir", path) ? fails(ENOTEMPTY) : REAL(rmdir)(path);
}

int unlinkat(int at, const char *path, int flags) {
    return flags & AT_REMOVEDIR && kept(path) && lacks("rmdir", path) ? fails(ENOTEMPTY) : REAL(unlinkat)(at, path, flags);
}

int rename(const char *from, const char *to) {
    struct stat s;
    return lacks("rename", from) && !stat(from, &s) && S_ISDIR(s.st_mode) ? fails(ENOSYS) : REAL(rename)(from, to);
}

static int broken(const char *path) {
    static int done;
    const char *where = getenv("ODD_EIO");
    return where && lacks("eio", path) && strstr(path, where) && strstr(path, "/state.json") && !done++;
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, int);
    va_end(rest);
    return broken(path) ? fails(EIO) : REAL(open64)(path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, int);
    va_end(rest);
    return broken(path) ? fails(EIO) : REAL(open)(path, flags, mode);
}
