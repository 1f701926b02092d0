// Memory that a backend hands out: allocation failure is a status here, while Buffer ends the
// process.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace sluice {

// Owns zeroed pages of the process, aligned to 64 bytes at least. Large ones ask for huge pages:
// decode reads every weight once a step, so misses of the TLB count. Movable, not copyable.
class HostMemory {
 public:
  HostMemory() = default;
  HostMemory(HostMemory&& other) noexcept;
  HostMemory& operator=(HostMemory&& other) noexcept;
  ~HostMemory();

  // RESOURCE_EXHAUSTED names the bytes that were asked for.
  static absl::StatusOr<HostMemory> Allocate(int64_t bytes);

  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  HostMemory(uint8_t* data, int64_t bytes) : data_(data), bytes_(bytes) {}

  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Backend::Allocate of the CPU.
class HostBuffer final : public DeviceBuffer {
 public:
  explicit HostBuffer(HostMemory memory) : memory_(std::move(memory)) {}
  void* data() override { return memory_.data(); }
  int64_t bytes() const override { return memory_.bytes(); }

 private:
  HostMemory memory_;
};

// Backend::UploadVector of the CPU.
class HostVector final : public DeviceVector {
 public:
  HostVector(HostMemory memory, int64_t size)
      : DeviceVector(memory.as<float>(), size), memory_(std::move(memory)) {}

 private:
  HostMemory memory_;
};

}  // namespace sluice
