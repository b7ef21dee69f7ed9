// A preloaded library that counts the file calls of a process and its children below one folder, and makes the N-th of
// them fail: with an error number, by writing only half, or by killing the process before the call. What to do stands in
// a file of `struct control` (named by HERDKERN_FAULTS), mapped by all of them, so the counter is one for all.
// cc -shared -fPIC -O1 -o faults.so faults.c -ldl
#define _GNU_SOURCE
#undef _FORTIFY_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { kCount = 0, kFail = 1, kShort = 2, kKill = 3 };
enum { kWrite = 1, kSync = 2, kRename = 4, kOpen = 8, kRead = 16, kMkdir = 32 };

struct control {
  char folder[1024];
  char place[1024];  // path of the first call that was hit
  int32_t action, error, calls, sticky;
  int64_t nth;    // from 1; 0: none
  int64_t count;  // calls so far
  int64_t hits;
};

static struct control* control;

#define REAL(result, name, ...)                                   \
  static result (*real)(__VA_ARGS__);                             \
  if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

__attribute__((constructor)) static void attach(void) {
  const char* path = getenv("HERDKERN_FAULTS");
  if (!path) return;
  REAL(int, "open", const char*, int, ...);
  int descriptor = real(path, O_RDWR | O_CLOEXEC);
  if (descriptor < 0) return;
  void* mapped = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  close(descriptor);
  if (mapped != MAP_FAILED) control = (struct control*)mapped;
}

static int below(const char* path) {
  size_t size = strlen(control->folder);
  return size && strncmp(path, control->folder, size) == 0 && (path[size] == '/' || path[size] == 0);
}

// Whether this call is the one: 1 to fail, 2 to be short.
static int hit(int kind, const char* path) {
  if (!control || control->nth < 0 || !(control->calls & kind) || !below(path)) return 0;
  int64_t number = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST);
  if (!control->nth || control->action == kCount) return 0;
  if (number != control->nth && !(control->sticky && number > control->nth)) return 0;
  if (__atomic_add_fetch(&control->hits, 1, __ATOMIC_SEQ_CST) == 1) strncpy(control->place, path, 1023);
  if (control->action == kKill) kill(getpid(), SIGKILL);
  errno = control->error;
  return control->action == kShort ? 2 : 1;
}

static const char* name_of(int descriptor, char* buffer) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t size = readlink(link, buffer, PATH_MAX - 1);
  buffer[size < 0 ? 0 : size] = 0;
  return buffer;
}

static int hit_fd(int kind, int descriptor) {
  if (!control || !(control->calls & kind)) return 0;
  int before = errno;
  char buffer[PATH_MAX];
  name_of(descriptor, buffer);
  errno = before;
  return hit(kind, buffer);
}

static int hit_at(int kind, int folder, const char* path) {
  if (!control || !(control->calls & kind)) return 0;
  if (path[0] == '/') return hit(kind, path);
  int before = errno;
  char buffer[2 * PATH_MAX];
  if (folder == AT_FDCWD) {
    if (!getcwd(buffer, PATH_MAX)) buffer[0] = 0;
  } else {
    name_of(folder, buffer);
  }
  strcat(buffer, "/");
  strncat(buffer, path, PATH_MAX - 1);
  errno = before;
  return hit(kind, buffer);
}

#define OPEN(name)                                               \
  int name(const char* path, int flags, ...) {                   \
    va_list list;                                                \
    va_start(list, flags);                                       \
    mode_t mode = va_arg(list, mode_t);                          \
    va_end(list);                                                \
    REAL(int, #name, const char*, int, ...);                     \
    return hit_at(kOpen, AT_FDCWD, path) ? -1 : real(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)
OPEN(__open_2)
OPEN(__open64_2)

#define OPENAT(name)                                              \
  int name(int folder, const char* path, int flags, ...) {        \
    va_list list;                                                 \
    va_start(list, flags);                                        \
    mode_t mode = va_arg(list, mode_t);                           \
    va_end(list);                                                 \
    REAL(int, #name, int, const char*, int, ...);                 \
    return hit_at(kOpen, folder, path) ? -1 : real(folder, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)
OPENAT(__openat_2)
OPENAT(__openat64_2)

#define FOPEN(name)                                                    \
  FILE* name(const char* path, const char* mode) {                     \
    REAL(FILE*, #name, const char*, const char*);                      \
    return hit_at(kOpen, AT_FDCWD, path) ? NULL : real(path, mode);    \
  }
FOPEN(fopen)
FOPEN(fopen64)

static size_t half(size_t size) { return size > 1 ? size / 2 : size; }

ssize_t write(int descriptor, const void* data, size_t size) {
  REAL(ssize_t, "write", int, const void*, size_t);
  int what = hit_fd(kWrite, descriptor);
  return what == 1 ? -1 : real(descriptor, data, what ? half(size) : size);
}

#define PWRITE(name)                                                            \
  ssize_t name(int descriptor, const void* data, size_t size, off_t offset) {   \
    REAL(ssize_t, #name, int, const void*, size_t, off_t);                      \
    int what = hit_fd(kWrite, descriptor);                                      \
    return what == 1 ? -1 : real(descriptor, data, what ? half(size) : size, offset); \
  }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int descriptor, const struct iovec* parts, int num_parts) {
  REAL(ssize_t, "writev", int, const struct iovec*, int);
  int what = hit_fd(kWrite, descriptor);
  if (what == 1) return -1;
  return what && num_parts && parts[0].iov_len ? write(descriptor, parts[0].iov_base, half(parts[0].iov_len))
                                               : real(descriptor, parts, num_parts);
}

// A FILE* writes by calls inside of libc that nobody can replace, and makes up for short ones itself.
size_t fwrite(const void* data, size_t size, size_t count, FILE* file) {
  REAL(size_t, "fwrite", const void*, size_t, size_t, FILE*);
  if (control && control->action != kShort && hit_fd(kWrite, fileno(file))) return 0;
  return real(data, size, count, file);
}

int fclose(FILE* file) {
  REAL(int, "fclose", FILE*);
  int what = 0;
  if (control && control->action != kShort) {
    int descriptor = fileno(file), flags = descriptor < 0 ? 0 : fcntl(descriptor, F_GETFL);
    what = descriptor >= 0 && (flags & O_ACCMODE) != O_RDONLY ? hit_fd(kWrite, descriptor) : 0;
  }
  int result = real(file);
  if (what) errno = control->error;
  return what ? EOF : result;
}

ssize_t read(int descriptor, void* data, size_t size) {
  REAL(ssize_t, "read", int, void*, size_t);
  return hit_fd(kRead, descriptor) ? -1 : real(descriptor, data, size);
}

#define PREAD(name)                                                       \
  ssize_t name(int descriptor, void* data, size_t size, off_t offset) {   \
    REAL(ssize_t, #name, int, void*, size_t, off_t);                      \
    return hit_fd(kRead, descriptor) ? -1 : real(descriptor, data, size, offset); \
  }
PREAD(pread)
PREAD(pread64)

size_t fread(void* data, size_t size, size_t count, FILE* file) {
  REAL(size_t, "fread", void*, size_t, size_t, FILE*);
  return hit_fd(kRead, fileno(file)) ? 0 : real(data, size, count, file);
}

int fsync(int descriptor) {
  REAL(int, "fsync", int);
  return hit_fd(kSync, descriptor) ? -1 : real(descriptor);
}

int fdatasync(int descriptor) {
  REAL(int, "fdatasync", int);
  return hit_fd(kSync, descriptor) ? -1 : real(descriptor);
}

int rename(const char* from, const char* to) {
  REAL(int, "rename", const char*, const char*);
  return hit_at(kRename, AT_FDCWD, from) ? -1 : real(from, to);
}

int renameat(int from_folder, const char* from, int to_folder, const char* to) {
  REAL(int, "renameat", int, const char*, int, const char*);
  return hit_at(kRename, from_folder, from) ? -1 : real(from_folder, from, to_folder, to);
}

int mkdir(const char* path, mode_t mode) {
  REAL(int, "mkdir", const char*, mode_t);
  return hit_at(kMkdir, AT_FDCWD, path) ? -1 : real(path, mode);
}
