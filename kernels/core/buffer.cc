#include "kernels/core/buffer.h"

#include <cstdlib>
#include <cstring>

#include "kernels/core/check.h"

namespace sluice {

Buffer::Buffer(size_t bytes) : size_(bytes) {
  constexpr size_t kAlignment = 64;  // One cache line, one AVX-512 vector.
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (rounded == 0) return;
  data_.reset(static_cast<uint8_t*>(std::aligned_alloc(kAlignment, rounded)));
  SLUICE_CHECK(data_ != nullptr) << "no memory for " << bytes << " bytes";
  std::memset(data_.get(), 0, rounded);
}

void Buffer::Free::operator()(uint8_t* pointer) const { std::free(pointer); }

}  // namespace sluice
