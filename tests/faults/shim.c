/* Faults on demand, preloaded into a process under test (Linux).
 *
 * FAULT is a list, separated by ';', of
 *
 *     CALLS,WHERE,N,ACTION
 *
 * CALLS: names of calls joined by '|': open (for writing), mkdir, rename, unlink (rmdir too), link, fsync (fdatasync
 * too), truncate, fallocate, read (pread, preadv), write (pwrite, pwritev). WHERE: text that the path must hold.
 * N: which matching call is hit; "N+" that one and all after it; "~N" each one with a chance of 1 in N, from
 * FAULT_SEED. ACTION: kill or stop (this process, before the call), short (a count smaller than asked for), term or int
 * (send that signal), or the name of an error.
 *
 * FAULT_LOG names a file that gets a line "CALL PATH" for every call below FAULT_ROOT, in order. FAULT_HITS names one
 * that gets a line "ACTION CALL" for every fault that came true.
 *
 * Nothing happens before rv_fault_arm() is called, which a constructor does when FAULT_AT_START is set.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_FAULTS 8
#define PROCEED 0
#define SHORTEN (-1)

struct fault {
    char calls[128], where[PATH_MAX], action[16];
    long nth;
    int onwards, random;
    long seen;
};

static struct fault faults[MAX_FAULTS];
static int fault_count, armed, log_fd = -1, hits_fd = -1;
static unsigned long long random_state;
static char root[PATH_MAX];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static const struct { const char *name; int code; } errors[] = {
    {"ENOSPC", ENOSPC}, {"EIO", EIO}, {"EINTR", EINTR}, {"EROFS", EROFS}, {"EDQUOT", EDQUOT}, {"EINVAL", EINVAL},
    {"EXDEV", EXDEV}, {"ENOSYS", ENOSYS}, {"EACCES", EACCES}, {"EAGAIN", EAGAIN}, {"EOPNOTSUPP", EOPNOTSUPP},
};

static void misused(const char *what) {
    dprintf(2, "fault shim: cannot read %s\n", what);
    _exit(99);
}

static int appending(const char *path) {
    return path ? syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666) : -1;
}

static void append(int fd, const char *one, const char *other) {
    char line[PATH_MAX + 32];
    if (fd >= 0) syscall(SYS_write, fd, line, snprintf(line, sizeof line, "%s %s\n", one, other));
}

void rv_fault_arm(void) {
    const char *text = getenv("FAULT"), *seed = getenv("FAULT_SEED");
    char copy[8192], *rest = copy, *one;
    snprintf(copy, sizeof copy, "%s", text ? text : "");
    fault_count = 0;
    while ((one = strsep(&rest, ";")) != NULL) {
        char nth[32];
        struct fault *f = &faults[fault_count];
        memset(f, 0, sizeof *f);
        if (!*one) continue;
        if (fault_count == MAX_FAULTS - 1) misused("so many faults");
        if (sscanf(one, "%127[^,],%4095[^,],%31[^,],%15s", f->calls, f->where, nth, f->action) != 4) misused(one);
        f->random = nth[0] == '~';
        f->nth = strtol(nth + f->random, NULL, 10);
        f->onwards = nth[strlen(nth) - 1] == '+';
        if (f->nth < 1) misused(one);
        fault_count++;
    }
    random_state = 0x9E3779B97F4A7C15ull ^ strtoull(seed ? seed : "1", NULL, 10) * 0xD1342543DE82EF95ull;
    snprintf(root, sizeof root, "%s", getenv("FAULT_ROOT") ? getenv("FAULT_ROOT") : "/");
    log_fd = appending(getenv("FAULT_LOG"));
    hits_fd = appending(getenv("FAULT_HITS"));
    armed = 1;
}

__attribute__((constructor)) static void at_start(void) {
    if (getenv("FAULT_AT_START")) rv_fault_arm();
}

static int one_in(long n) { /* xorshift64* */
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (long)((random_state * 0x2545F4914F6CDD1Dull >> 33) % n) == 0;
}

static int names(const char *list, const char *call) {
    size_t length = strlen(call);
    for (const char *at = list; (at = strstr(at, call)) != NULL; at += length)
        if ((at == list || at[-1] == '|') && (at[length] == 0 || at[length] == '|')) return 1;
    return 0;
}

/* What is to happen to a call: PROCEED, SHORTEN, or an errno. */
static int decide(const char *call, const char *path) {
    int verdict = PROCEED;
    if (!armed || strncmp(path, root, strlen(root)) != 0) return PROCEED;
    pthread_mutex_lock(&mutex);
    append(log_fd, call, path);
    for (int i = 0; i < fault_count && verdict == PROCEED; i++) {
        struct fault *f = &faults[i];
        if (!names(f->calls, call) || !strstr(path, f->where)) continue;
        f->seen++;
        if (f->random ? !one_in(f->nth) : f->onwards ? f->seen < f->nth : f->seen != f->nth) continue;
        append(hits_fd, f->action, call);
        if (!strcmp(f->action, "kill")) {
            syscall(SYS_kill, getpid(), SIGKILL);
        } else if (!strcmp(f->action, "stop")) {
            syscall(SYS_kill, getpid(), SIGSTOP);
        } else if (!strcmp(f->action, "int") || !strcmp(f->action, "term")) {
            syscall(SYS_kill, getpid(), f->action[0] == 'i' ? SIGINT : SIGTERM);
        } else if (!strcmp(f->action, "short")) {
            verdict = SHORTEN;
        } else {
            for (size_t e = 0; e < sizeof errors / sizeof *errors; e++)
                if (!strcmp(f->action, errors[e].name)) verdict = errors[e].code;
            if (verdict == PROCEED) misused(f->action);
        }
    }
    pthread_mutex_unlock(&mutex);
    return verdict;
}

static int decide_at(const char *call, int dir, const char *name) {
    char path[PATH_MAX * 2], link[64];
    ssize_t length = 0;
    if (!armed) return PROCEED;
    if (name[0] != '/') {
        snprintf(link, sizeof link, dir == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dir);
        length = syscall(SYS_readlink, link, path, PATH_MAX - 1);
        if (length < 0) return PROCEED;
        path[length++] = '/';
    }
    snprintf(path + length, PATH_MAX, "%s", name);
    return decide(call, path);
}

static int decide_fd(const char *call, int fd) {
    char path[PATH_MAX], link[64];
    if (!armed) return PROCEED;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlink, link, path, sizeof path - 1);
    if (length < 0) return PROCEED;
    path[length] = 0;
    return decide(call, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL_UNLESS_PROCEED(verdict) \
    do { int v_ = (verdict); if (v_ > 0) { errno = v_; return -1; } } while (0)

/* Direct I/O goes on only from an aligned place, and a real device never stops elsewhere. */
static size_t shortened(int fd, size_t count) {
    size_t step = fcntl(fd, F_GETFL) & O_DIRECT ? 4096 : 1;
    size_t half = count / 2 / step * step;
    return half ? half : count;
}

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY; }

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    if (writes(flags)) FAIL_UNLESS_PROCEED(decide_at("open", AT_FDCWD, path));
    return REAL(open64)(path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    if (writes(flags)) FAIL_UNLESS_PROCEED(decide_at("open", AT_FDCWD, path));
    return REAL(open)(path, flags, mode);
}

int openat64(int dir, const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    if (writes(flags)) FAIL_UNLESS_PROCEED(decide_at("open", dir, path));
    return REAL(openat64)(dir, path, flags, mode);
}

#define ON_PATH(call, name, path, declared, passed) \
    int name declared { FAIL_UNLESS_PROCEED(decide_at(call, AT_FDCWD, path)); return REAL(name) passed; }
#define ON_DIR(call, name, dir, path, declared, passed) \
    int name declared { FAIL_UNLESS_PROCEED(decide_at(call, dir, path)); return REAL(name) passed; }
#define ON_FD(call, name, declared, passed) \
    int name declared { FAIL_UNLESS_PROCEED(decide_fd(call, fd)); return REAL(name) passed; }
#define COUNTED(call, name, declared, passed, type) \
    type name declared { \
        int verdict = decide_fd(call, fd); \
        FAIL_UNLESS_PROCEED(verdict); \
        if (verdict == SHORTEN) count = shortened(fd, count); \
        return REAL(name) passed; \
    }
/* Vectors of one buffer, which is what Python passes here, are shortened; others are not. */
#define VECTORED(call, name, declared, passed) \
    ssize_t name declared { \
        int verdict = decide_fd(call, fd); \
        FAIL_UNLESS_PROCEED(verdict); \
        struct iovec smaller = *vector; \
        if (verdict == SHORTEN && vectors == 1) { \
            smaller.iov_len = shortened(fd, vector->iov_len); \
            vector = &smaller; \
        } \
        return REAL(name) passed; \
    }

ON_PATH("mkdir", mkdir, path, (const char *path, mode_t mode), (path, mode))
ON_DIR("mkdir", mkdirat, dir, path, (int dir, const char *path, mode_t mode), (dir, path, mode))
ON_PATH("rename", rename, to, (const char *from, const char *to), (from, to))
ON_DIR("rename", renameat, to_dir, to, (int dir, const char *from, int to_dir, const char *to), (dir, from, to_dir, to))
ON_DIR("exchange", renameat2, to_dir, to, (int dir, const char *from, int to_dir, const char *to, unsigned flags),
       (dir, from, to_dir, to, flags))
ON_PATH("unlink", unlink, path, (const char *path), (path))
ON_DIR("unlink", unlinkat, dir, path, (int dir, const char *path, int flags), (dir, path, flags))
ON_PATH("unlink", rmdir, path, (const char *path), (path))
ON_PATH("link", link, to, (const char *from, const char *to), (from, to))
ON_FD("fsync", fsync, (int fd), (fd))
ON_FD("fsync", fdatasync, (int fd), (fd))
ON_FD("truncate", ftruncate64, (int fd, off64_t size), (fd, size))
ON_FD("fallocate", fallocate64, (int fd, int mode, off64_t at, off64_t size), (fd, mode, at, size))
COUNTED("read", read, (int fd, void *data, size_t count), (fd, data, count), ssize_t)
COUNTED("write", write, (int fd, const void *data, size_t count), (fd, data, count), ssize_t)
COUNTED("read", pread64, (int fd, void *data, size_t count, off64_t at), (fd, data, count, at), ssize_t)
COUNTED("write", pwrite64, (int fd, const void *data, size_t count, off64_t at), (fd, data, count, at), ssize_t)
VECTORED("read", preadv64v2, (int fd, const struct iovec *vector, int vectors, off64_t at, int flags),
         (fd, vector, vectors, at, flags))
/* Python calls the one above, our compiled code this one. */
VECTORED("read", preadv2, (int fd, const struct iovec *vector, int vectors, off_t at, int flags),
         (fd, vector, vectors, at, flags))
VECTORED("read", preadv64, (int fd, const struct iovec *vector, int vectors, off64_t at), (fd, vector, vectors, at))
VECTORED("write", pwritev64v2, (int fd, const struct iovec *vector, int vectors, off64_t at, int flags),
         (fd, vector, vectors, at, flags))
VECTORED("write", pwritev64, (int fd, const struct iovec *vector, int vectors, off64_t at), (fd, vector, vectors, at))
