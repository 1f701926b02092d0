#include "kernels/cpu/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace sluice {

HostMemory::HostMemory(HostMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

HostMemory& HostMemory::operator=(HostMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

HostMemory::~HostMemory() {
  if (data_ != nullptr) munmap(data_, std::max<int64_t>(bytes_, 1));
}

absl::StatusOr<HostMemory> HostMemory::Allocate(int64_t bytes) {
  constexpr int64_t kHugePage = int64_t{2} << 20;
  if (bytes < 0)
    return absl::InvalidArgumentError(absl::StrCat("cannot allocate ", bytes, " bytes"));
  void* data = mmap(nullptr, std::max<int64_t>(bytes, 1), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the system has no ", bytes, " bytes of memory left; give this worker fewer layers"));
  }
  if (bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);  // A wish; failure changes nothing
  // The system zeroes a huge page when it is first touched. The first page of each of a shard's
  // buffers together is 0.2 s for a small model: to be paid at load, not by the first request.
  if (bytes > 0) *static_cast<volatile uint8_t*>(data) = 0;
  return HostMemory(static_cast<uint8_t*>(data), bytes);
}

}  // namespace sluice
