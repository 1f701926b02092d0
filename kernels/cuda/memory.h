// Memory of the CUDA backend: device memory and pinned host memory, each with an owner, and CUDA's
// errors as statuses. Everything here belongs to loading: a step allocates nothing.
//
// Threads: functions may be called from any thread that has selected the device (cudaSetDevice); an
// object belongs to one thread at a time, and may be freed on another one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace sluice {

// OK, or the error with CUDA's own name and text after `what` ("copy of a weight"):
// RESOURCE_EXHAUSTED for cudaErrorMemoryAllocation, INTERNAL otherwise.
absl::Status CudaStatus(cudaError_t error, std::string_view what);

// Owns zeroed device memory, aligned to 256 bytes. Movable, not copyable.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;
  ~DeviceMemory();

  // Of the current device; zeroed before it returns. No bytes give a null pointer.
  // RESOURCE_EXHAUSTED says the bytes needed and the bytes free on the card.
  static absl::StatusOr<DeviceMemory> Allocate(int64_t bytes);

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Owns zeroed host memory that the device can copy from and to while the host goes on. Movable, not
// copyable.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  PinnedMemory(PinnedMemory&& other) noexcept { *this = std::move(other); }
  PinnedMemory& operator=(PinnedMemory&& other) noexcept;
  ~PinnedMemory();

  // RESOURCE_EXHAUSTED names the bytes that were asked for.
  static absl::StatusOr<PinnedMemory> Allocate(int64_t bytes);

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Backend::Allocate of CUDA.
class CudaBuffer final : public DeviceBuffer {
 public:
  explicit CudaBuffer(DeviceMemory memory) : memory_(std::move(memory)) {}
  void* data() override { return memory_.data(); }
  int64_t bytes() const override { return memory_.bytes(); }

 private:
  DeviceMemory memory_;
};

// Backend::UploadVector of CUDA: `size` floats in memory.
class CudaVector final : public DeviceVector {
 public:
  CudaVector(DeviceMemory memory, int64_t size)
      : DeviceVector(memory.as<float>(), size), memory_(std::move(memory)) {}

 private:
  DeviceMemory memory_;
};

}  // namespace sluice
