// For LD_PRELOAD: writes, renames and fsyncs of paths below a folder are counted over all processes; the n-th one fails.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

static unsigned long *calls;  // [0]: all so far, [1]: those that were made to fail; a file that all processes map
static unsigned long first;   // the number of the call that fails
static int forever, error;    // whether all after it do; errno, 0: half of a write's bytes are written
static const char *folder;

__attribute__((constructor)) static void begin(void) {
  const char *file = getenv("FAILING_COUNTER");
  folder = getenv("FAILING_FOLDER");
  if (!file || !folder) return;
  first = strtoul(getenv("FAILING_CALL"), NULL, 10);
  forever = getenv("FAILING_FOREVER") != NULL;
  error = atoi(getenv("FAILING_ERRNO"));
  int descriptor = open(file, O_RDWR);
  void *mapped = mmap(NULL, 2 * sizeof *calls, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (mapped != MAP_FAILED) calls = mapped;
  close(descriptor);
}

static int fails(const char *path) {
  size_t length = strlen(folder);
  if (strncmp(path, folder, length) || path[length] != '/') return 0;
  unsigned long number = __atomic_add_fetch(&calls[0], 1, __ATOMIC_SEQ_CST);
  if (number != first && !(forever && first && number > first)) return 0;
  __atomic_add_fetch(&calls[1], 1, __ATOMIC_SEQ_CST);
  errno = error;
  return 1;
}

static int fails_at(const char *path) {
  char whole[2 * PATH_MAX];
  if (!calls || !folder) return 0;
  if (path[0] == '/') return fails(path);
  if (!getcwd(whole, PATH_MAX)) return 0;
  strncat(strcat(whole, "/"), path, PATH_MAX - 1);
  return fails(whole);
}

static int fails_in(int descriptor) {
  char link[64], path[PATH_MAX];
  if (!calls || !folder) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length <= 0 || path[0] != '/') return 0;
  path[length] = 0;
  return fails(path);
}

#define REAL(type, name, ...) \
  static type (*real)(__VA_ARGS__); \
  if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

ssize_t write(int descriptor, const void *bytes, size_t count) {
  REAL(ssize_t, write, int, const void *, size_t);
  int saved = errno;
  if (fails_in(descriptor)) {
    if (error) return -1;
    count = count > 1 ? count / 2 : count;
  }
  errno = saved;
  return real(descriptor, bytes, count);
}

#define PWRITE(name, offset_type) \
  ssize_t name(int descriptor, const void *bytes, size_t count, offset_type offset) { \
    REAL(ssize_t, name, int, const void *, size_t, offset_type); \
    int saved = errno; \
    if (fails_in(descriptor)) { \
      if (error) return -1; \
      count = count > 1 ? count / 2 : count; \
    } \
    errno = saved; \
    return real(descriptor, bytes, count, offset); \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
  REAL(ssize_t, writev, int, const struct iovec *, int);
  int saved = errno;
  if (fails_in(descriptor)) {
    if (error) return -1;
    count = count > 1 ? count / 2 : count;
  }
  errno = saved;
  return real(descriptor, parts, count);
}

#define SYNC(name) \
  int name(int descriptor) { \
    REAL(int, name, int); \
    int saved = errno; \
    if (fails_in(descriptor) && error) return -1; \
    errno = saved; \
    return real(descriptor); \
  }
SYNC(fsync)
SYNC(fdatasync)

int rename(const char *from, const char *to) {
  REAL(int, rename, const char *, const char *);
  int saved = errno;
  if (fails_at(to) && error) return -1;
  errno = saved;
  return real(from, to);
}
