/* A layer before the disk, loaded with LD_PRELOAD: it counts what changes files below a folder, and at the wanted
 * operation kills its process, says that the disk is full, writes less than it was asked to, or only records.
 *
 * What to do is read from a file that all processes of a trial map (struct plan, as layer.py packs it), so that they
 * count together. Operations are told by libc's names: Python, Rust, C++ and the C library's fwrite pass through here.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, KILL, KILL_AMID, FULL, FULL_ONCE, SHORT };
enum { CREATE = 1, WRITE, TRUNCATE, RENAME, UNLINK, MKDIR, RMDIR, LINK, SYNC };

struct plan {
  int64_t count, at, mode, record;
  char root[1024], log[1024];
};
struct entry {
  int64_t kind, offset, path_size, more_size;
};

static struct plan *plan;
static int log_fd = -1;
static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;

/* Begin as a plan says; a process that execs begins by itself. */
void chaos_arm(const char *path) {
  int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return;
  plan = mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  syscall(SYS_close, fd);
  if (plan == MAP_FAILED) plan = NULL;
}

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("CHAOS_PLAN");
  if (path) chaos_arm(path);
}

static const char *below_root(const char *path) {
  size_t size = strlen(plan->root);
  return strncmp(path, plan->root, size) == 0 && path[size] == '/' ? path : NULL;
}

/* The whole path of what a call names, in `into`; NULL if it is not below the root. */
static const char *named(int dir, const char *path, char *into) {
  if (!plan || !path) return NULL;
  if (path[0] == '/') {
    snprintf(into, PATH_MAX, "%s", path);
  } else {
    char link[64];
    snprintf(link, sizeof link, dir == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dir);
    ssize_t size = readlink(link, into, PATH_MAX - 1);
    if (size < 0) return NULL;
    snprintf(into + size, PATH_MAX - size, "/%s", path);
  }
  char *to = into;
  for (char *from = into; *from; from++) { /* a//b, a/./b, a/ */
    while (from[0] == '/' && (from[1] == '/' || (from[1] == '.' && from[2] == '/'))) from += from[1] == '/' ? 1 : 2;
    *to++ = *from;
  }
  *to = 0;
  if (to > into + 1 && to[-1] == '/') to[-1] = 0;
  return below_root(into);
}

static const char *open_file(int fd, char *into) {
  char link[64];
  if (!plan || fd < 0) return NULL;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, into, PATH_MAX - 1);
  if (size < 0) return NULL;
  into[size] = 0;
  return below_root(into);
}

static void note(int kind, const char *path, int64_t offset, const void *more, size_t more_size) {
  if (!plan->record) return;
  if (log_fd < 0) log_fd = (int)syscall(SYS_openat, AT_FDCWD, plan->log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  struct entry entry = {kind, offset, (int64_t)strlen(path), (int64_t)more_size};
  struct iovec parts[] = {{&entry, sizeof entry}, {(void *)path, strlen(path)}, {(void *)more, more_size}};
  if (syscall(SYS_writev, log_fd, parts, 3) < 0) abort();
}

/* Count an operation that is about to be done. 0: do it. -1: fail. 1: do a part of it, then fail or stop. */
static int count(int takes_room) {
  int64_t now = __atomic_add_fetch(&plan->count, 1, __ATOMIC_SEQ_CST);
  if (!plan->mode || now < plan->at) return 0;
  switch (plan->mode) {
    case KILL_AMID:
      if (now == plan->at && takes_room == 2) return 1; /* fall through */
    case KILL:
      if (now == plan->at) kill(getpid(), SIGKILL);
      return 0;
    case FULL:
    case FULL_ONCE:
      if (!takes_room || (plan->mode == FULL_ONCE && now > plan->at)) return 0;
      if (now == plan->at && takes_room == 2) return 1;
      errno = ENOSPC;
      return -1;
    case SHORT:
      return takes_room == 2;
  }
  return 0;
}

static int opened(int dir, const char *path, int flags, mode_t mode) {
  char into[PATH_MAX];
  const char *whole = NULL;
  struct stat before;
  if ((flags & (O_CREAT | O_TRUNC)) && (flags & O_TMPFILE) != O_TMPFILE) whole = named(dir, path, into);
  if (!whole) return (int)syscall(SYS_openat, dir, path, flags, mode);
  int is_new = syscall(SYS_newfstatat, AT_FDCWD, whole, &before, 0) != 0;
  int changes = is_new ? flags & O_CREAT : (flags & O_TRUNC) && before.st_size;
  pthread_mutex_lock(&one);
  int fd = changes && count(is_new) < 0 ? -1 : (int)syscall(SYS_openat, dir, path, flags, mode);
  if (fd >= 0 && changes) note(is_new ? CREATE : TRUNCATE, whole, 0, "", 0);
  int error = errno;
  pthread_mutex_unlock(&one);
  errno = error;
  return fd;
}

#define OPEN(dir)                                                              \
  va_list rest;                                                                \
  va_start(rest, flags);                                                       \
  mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;    \
  va_end(rest);                                                                \
  return opened(dir, path, flags, mode);

int open(const char *path, int flags, ...) { OPEN(AT_FDCWD) }
int open64(const char *path, int flags, ...) { OPEN(AT_FDCWD) }
int openat(int dir, const char *path, int flags, ...) { OPEN(dir) }
int openat64(int dir, const char *path, int flags, ...) { OPEN(dir) }
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

/* place < 0: where the file stands. */
static ssize_t written(int fd, const void *data, size_t size, off_t place) {
  char into[PATH_MAX];
  const char *whole = size ? open_file(fd, into) : NULL;
  pthread_mutex_lock(&one);
  int what = whole ? count(2) : 0, dies = what == 1 && plan->mode == KILL_AMID;
  int fails = what == 1 && (plan->mode == FULL || plan->mode == FULL_ONCE) && size < 2;
  ssize_t done = -1;
  if (fails) errno = ENOSPC;
  if (what == 1) size = size > 1 ? size / 2 : size;
  if (what >= 0 && !fails)
    done = place < 0 ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, place);
  int error = errno;
  if (dies) kill(getpid(), SIGKILL);
  if (done > 0 && whole) note(WRITE, whole, place < 0 ? lseek(fd, 0, SEEK_CUR) - done : place, data, done);
  pthread_mutex_unlock(&one);
  errno = error;
  return done;
}

ssize_t write(int fd, const void *data, size_t size) { return written(fd, data, size, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t place) { return written(fd, data, size, place); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t place) { return written(fd, data, size, place); }

ssize_t writev(int fd, const struct iovec *parts, int number) {
  char into[PATH_MAX];
  if (!open_file(fd, into)) return syscall(SYS_writev, fd, parts, number);
  ssize_t all = 0;
  for (int each = 0; each < number; each++) {
    ssize_t done = parts[each].iov_len ? written(fd, parts[each].iov_base, parts[each].iov_len, -1) : 0;
    if (done < 0) return all ? all : -1;
    all += done;
    if ((size_t)done < parts[each].iov_len) break;
  }
  return all;
}

size_t fwrite(const void *data, size_t size, size_t number, FILE *file) {
  static size_t (*real)(const void *, size_t, size_t, FILE *);
  if (!real) real = (size_t(*)(const void *, size_t, size_t, FILE *))dlsym(RTLD_NEXT, "fwrite");
  char into[PATH_MAX];
  if (!size || !number || !open_file(fileno(file), into)) return real(data, size, number, file);
  fflush(file);
  for (size_t left = size * number; left;) {
    ssize_t done = written(fileno(file), (const char *)data + size * number - left, left, -1);
    if (done < 0) return number - (left + size - 1) / size;
    left -= done;
  }
  return number;
}

/* Those who copy by these go on with read and write. */
ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
  char into[PATH_MAX];
  if (!open_file(to, into)) return syscall(SYS_sendfile, to, from, offset, size);
  errno = EINVAL;
  return -1;
}
ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) { return sendfile(to, from, offset, size); }
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *place, size_t size, unsigned flags) {
  char into[PATH_MAX];
  if (!open_file(to, into)) return syscall(SYS_copy_file_range, from, at, to, place, size, flags);
  errno = EXDEV;
  return -1;
}

/* An operation on names. The call is made once its turn has been counted, and recorded if it went well. */
#define BY_NAME(kind, takes_room, call, dir, path, more_dir, more_path)              \
  char into[PATH_MAX], other[PATH_MAX];                                              \
  const char *whole = named(dir, path, into);                                        \
  const char *more = more_path ? named(more_dir, more_path, other) : NULL;           \
  if (!whole) return (int)call;                                                      \
  pthread_mutex_lock(&one);                                                          \
  int done = count(takes_room) ? -1 : (int)call;                                     \
  if (done == 0) note(kind, whole, 0, more ? more : "", more ? strlen(more) : 0);    \
  int error = errno;                                                                 \
  pthread_mutex_unlock(&one);                                                        \
  errno = error;                                                                     \
  return done;

static int renamed(int d, const char *a, int e, const char *b, unsigned flags) {
  BY_NAME(RENAME, 0, syscall(SYS_renameat2, d, a, e, b, flags), d, a, e, b)
}
int rename(const char *a, const char *b) { return renamed(AT_FDCWD, a, AT_FDCWD, b, 0); }
int renameat(int d, const char *a, int e, const char *b) { return renamed(d, a, e, b, 0); }
int renameat2(int d, const char *a, int e, const char *b, unsigned flags) { return renamed(d, a, e, b, flags); }

int unlinkat(int d, const char *a, int flags) {
  BY_NAME(flags & AT_REMOVEDIR ? RMDIR : UNLINK, 0, syscall(SYS_unlinkat, d, a, flags), d, a, 0, (char *)NULL)
}
int unlink(const char *a) { return unlinkat(AT_FDCWD, a, 0); }
int rmdir(const char *a) { return unlinkat(AT_FDCWD, a, AT_REMOVEDIR); }
int remove(const char *a) {
  int done = unlinkat(AT_FDCWD, a, 0);
  return done && errno == EISDIR ? rmdir(a) : done;
}

int mkdirat(int d, const char *a, mode_t mode) {
  char there[PATH_MAX];
  struct stat before;
  const char *path = named(d, a, there);
  if (!path || syscall(SYS_newfstatat, AT_FDCWD, path, &before, 0) == 0) return (int)syscall(SYS_mkdirat, d, a, mode);
  BY_NAME(MKDIR, 1, syscall(SYS_mkdirat, d, a, mode), d, a, 0, (char *)NULL)
}
int mkdir(const char *a, mode_t mode) { return mkdirat(AT_FDCWD, a, mode); }

int linkat(int d, const char *a, int e, const char *b, int flags) {
  BY_NAME(LINK, 1, syscall(SYS_linkat, d, a, e, b, flags), d, a, e, b)
}
int link(const char *a, const char *b) { return linkat(AT_FDCWD, a, AT_FDCWD, b, 0); }

int ftruncate(int fd, off_t size) {
  char into[PATH_MAX];
  struct stat before;
  const char *whole = open_file(fd, into);
  if (!whole || fstat(fd, &before) || before.st_size == size) return (int)syscall(SYS_ftruncate, fd, size);
  pthread_mutex_lock(&one);
  int done = count(size > before.st_size) < 0 ? -1 : (int)syscall(SYS_ftruncate, fd, size), error = errno;
  if (done == 0) note(TRUNCATE, whole, size, "", 0);
  pthread_mutex_unlock(&one);
  errno = error;
  return done;
}
int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }

/* Waiting for the disk would be most of a trial; no test cuts the power of this machine. What a file holds is recorded:
 * some write through mapped memory, which passes by this layer. */
int fsync(int fd) {
  char into[PATH_MAX] = "";
  const char *whole = open_file(fd, into);
  struct stat now;
  if (!plan) return (int)syscall(SYS_fsync, fd);
  if (!plan->record || !(whole || strcmp(into, plan->root) == 0) || fstat(fd, &now)) return 0;
  size_t size = S_ISREG(now.st_mode) ? (size_t)now.st_size : 0;
  int again = (int)syscall(SYS_openat, AT_FDCWD, into, O_RDONLY | O_CLOEXEC);
  void *content = size && again >= 0 ? mmap(NULL, size, PROT_READ, MAP_SHARED, again, 0) : MAP_FAILED;
  pthread_mutex_lock(&one);
  note(SYNC, into, 0, content == MAP_FAILED ? "" : content, content == MAP_FAILED ? 0 : size);
  pthread_mutex_unlock(&one);
  if (content != MAP_FAILED) munmap(content, size);
  if (again >= 0) syscall(SYS_close, again);
  return 0;
}
int fdatasync(int fd) { return fsync(fd); }
