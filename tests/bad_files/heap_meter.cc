#include "tests/bad_files/heap_meter.h"

#include <malloc.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SLUICE_OWN_MALLOC 0
#else
#define SLUICE_OWN_MALLOC 1
#endif

namespace {

std::atomic<int64_t> live_bytes{0};
std::atomic<int64_t> peak_bytes_seen{0};
std::atomic<int64_t> bytes_read{0};

}  // namespace

#if SLUICE_OWN_MALLOC

extern "C" {
// glibc's own, by the names that are there for replacements.
void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_realloc(void* block, size_t size);
void* __libc_memalign(size_t alignment, size_t size);
void __libc_free(void* block);
}

namespace {

void* Count(void* block) {
  if (block == nullptr) return nullptr;
  const auto size = static_cast<int64_t>(malloc_usable_size(block));
  const int64_t now = live_bytes.fetch_add(size, std::memory_order_relaxed) + size;
  int64_t peak = peak_bytes_seen.load(std::memory_order_relaxed);
  while (now > peak && !peak_bytes_seen.compare_exchange_weak(peak, now)) {
  }
  return block;
}

void Uncount(void* block) {
  if (block != nullptr) live_bytes -= static_cast<int64_t>(malloc_usable_size(block));
}

}  // namespace

extern "C" {

void* malloc(size_t size) { return Count(__libc_malloc(size)); }
void* calloc(size_t count, size_t size) { return Count(__libc_calloc(count, size)); }
void* realloc(void* block, size_t size) {
  const int64_t old = block == nullptr ? 0 : static_cast<int64_t>(malloc_usable_size(block));
  void* const moved = __libc_realloc(block, size);
  if (moved == nullptr && size != 0) return nullptr;  // The old block is still there.
  live_bytes -= old;
  return Count(moved);
}
void* memalign(size_t alignment, size_t size) { return Count(__libc_memalign(alignment, size)); }
void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
int posix_memalign(void** block, size_t alignment, size_t size) {
  *block = memalign(alignment, size);
  return *block == nullptr ? ENOMEM : 0;
}
void free(void* block) {
  Uncount(block);
  __libc_free(block);
}

ssize_t pread(int fd, void* to, size_t size, off_t offset) {
  const ssize_t got = syscall(SYS_pread64, fd, to, size, offset);
  if (got > 0) bytes_read += got;
  return got;
}

}  // extern "C"

#endif

namespace sluice::bad_files {

HeapMeter::HeapMeter() : start_(live_bytes), read_start_(bytes_read) { peak_bytes_seen = start_; }
int64_t HeapMeter::peak_bytes() const { return peak_bytes_seen - start_; }
int64_t HeapMeter::read_bytes() const { return bytes_read - read_start_; }
bool HeapMeter::works() { return SLUICE_OWN_MALLOC != 0; }

}  // namespace sluice::bad_files
