// Preloaded into a process: once armed, the n-th system call on files below a folder fails or ends the process.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>

namespace {

enum Kind { kReads = 0, kRemoves = 1, kWrites = 2 };  // ordered by what a full and a read-only disk refuse

char folder[PATH_MAX];
std::atomic<long> calls{0};
long fails_at = 0;      // 0: not armed
int code = 0;           // errno of the failure; 0: SIGKILL
int persists_from = 3;  // later calls of this kind and higher ones fail too

bool fails(Kind kind, const char* path) {
    if (!fails_at || strncmp(path, folder, strlen(folder)) != 0) return false;
    const long n = ++calls;
    if (n < fails_at || (n > fails_at && kind < persists_from)) return false;
    if (n == fails_at && persists_from < 3 && kind < persists_from) return false;
    if (!code) kill(getpid(), SIGKILL);
    errno = code;
    return true;
}

bool fails(Kind kind, int descriptor, const char* name = nullptr) {
    if (!fails_at) return false;
    if (name && (name[0] == '/' || descriptor == AT_FDCWD)) return fails(kind, name);
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    const ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return false;
    path[length] = 0;
    return fails(kind, path);
}

template <class Function>
Function next(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

Kind kind_of(int flags) { return flags & (O_WRONLY | O_RDWR | O_CREAT) ? kWrites : kReads; }

int mode_of(int flags, va_list arguments) { return flags & O_CREAT ? va_arg(arguments, int) : 0; }

}  // namespace

extern "C" {

// fault: an errno, or 0 for SIGKILL.   persists: lowest kind of which all later calls fail too; 3: none.
void arm_files(const char* path, long n, int fault, int persists) {
    snprintf(folder, sizeof folder, "%s", path);
    code = fault;
    persists_from = persists;
    calls = 0;
    fails_at = n;
}

long file_calls() { return calls; }

#define INTERPOSE(result, name, parameters, kind, where, arguments)           \
    result name parameters {                                                  \
        static const auto real = next<result(*) parameters>(#name);           \
        return fails(kind, where) ? static_cast<result>(-1) : real arguments; \
    }
#define PAIR(...) __VA_ARGS__

INTERPOSE(ssize_t, write, (int fd, const void* data, size_t n), kWrites, fd, (fd, data, n))
INTERPOSE(ssize_t, writev, (int fd, const iovec* data, int n), kWrites, fd, (fd, data, n))
INTERPOSE(ssize_t, pwrite64, (int fd, const void* data, size_t n, off64_t at), kWrites, fd, (fd, data, n, at))
INTERPOSE(ssize_t, sendfile64, (int to, int from, off64_t* at, size_t n), kWrites, to, (to, from, at, n))
INTERPOSE(ssize_t, copy_file_range, (int from, off64_t* at, int to, off64_t* target, size_t n, unsigned flags), kWrites,
          to, (from, at, to, target, n, flags))
INTERPOSE(int, ftruncate64, (int fd, off64_t size), kWrites, fd, (fd, size))
INTERPOSE(int, fsync, (int fd), kWrites, fd, (fd))
INTERPOSE(int, mkdir, (const char* path, mode_t mode), kWrites, path, (path, mode))
INTERPOSE(int, rename, (const char* from, const char* to), kWrites, to, (from, to))
INTERPOSE(int, renameat2, (int a, const char* from, int b, const char* to, unsigned flags), kWrites, to,
          (a, from, b, to, flags))
INTERPOSE(int, unlink, (const char* path), kRemoves, path, (path))
INTERPOSE(int, unlinkat, (int at, const char* path, int flags), kRemoves, PAIR(at, path), (at, path, flags))
INTERPOSE(int, rmdir, (const char* path), kRemoves, path, (path))
INTERPOSE(int, chmod, (const char* path, mode_t mode), kRemoves, path, (path, mode))

#define INTERPOSE_OPEN(name)                                                  \
    int name(const char* path, int flags, ...) {                              \
        static const auto real = next<int (*)(const char*, int, ...)>(#name); \
        va_list rest;                                                         \
        va_start(rest, flags);                                                \
        const int mode = mode_of(flags, rest);                                \
        va_end(rest);                                                         \
        return fails(kind_of(flags), path) ? -1 : real(path, flags, mode);    \
    }
#define INTERPOSE_OPENAT(name)                                                     \
    int name(int at, const char* path, int flags, ...) {                           \
        static const auto real = next<int (*)(int, const char*, int, ...)>(#name); \
        va_list rest;                                                              \
        va_start(rest, flags);                                                     \
        const int mode = mode_of(flags, rest);                                     \
        va_end(rest);                                                              \
        return fails(kind_of(flags), at, path) ? -1 : real(at, path, flags, mode); \
    }

INTERPOSE_OPEN(open)
INTERPOSE_OPEN(open64)
INTERPOSE_OPENAT(openat)
INTERPOSE_OPENAT(openat64)

}  // extern "C"
