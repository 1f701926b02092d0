#include "kernels/cuda/memory.h"

#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "kernels/core/status_macros.h"

namespace sluice {
namespace {

// "1.50 GiB (1610612736 bytes)"
std::string BytesText(int64_t bytes) {
  const auto hundredths = [bytes](int shift) { return bytes * 100 >> shift; };
  const int shift = bytes >= int64_t{1} << 30 ? 30 : 20;
  const int64_t value = hundredths(shift);
  return absl::StrCat(value / 100, ".", value % 100 < 10 ? "0" : "", value % 100,
                      shift == 30 ? " GiB (" : " MiB (", bytes, " bytes)");
}

absl::Status OutOfDeviceMemory(int64_t bytes) {
  size_t free = 0;
  size_t total = 0;
  if (cudaMemGetInfo(&free, &total) != cudaSuccess) free = total = 0;
  return absl::ResourceExhaustedError(absl::StrCat(
      "the GPU has no room for ", BytesText(bytes), ": ", BytesText(static_cast<int64_t>(free)),
      " free of ", BytesText(static_cast<int64_t>(total))));
}

}  // namespace

absl::Status CudaStatus(cudaError_t error, std::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string text = absl::StrCat(std::string(what), ": ", cudaGetErrorName(error), ", ",
                                        cudaGetErrorString(error));
  return error == cudaErrorMemoryAllocation ? absl::ResourceExhaustedError(text)
                                            : absl::InternalError(text);
}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

// Freeing reports errors of earlier kernels, and those after the driver has gone; both were or will
// be reported where they matter.
DeviceMemory::~DeviceMemory() {
  if (data_ != nullptr) static_cast<void>(cudaFree(data_));
}

absl::StatusOr<DeviceMemory> DeviceMemory::Allocate(int64_t bytes) {
  SLUICE_CHECK(bytes >= 0) << bytes;
  DeviceMemory memory;
  if (bytes == 0) return memory;
  const cudaError_t error = cudaMalloc(&memory.data_, static_cast<size_t>(bytes));
  if (error == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());  // Not sticky: the next call must not report it again
    memory.data_ = nullptr;
    return OutOfDeviceMemory(bytes);
  }
  SLUICE_RETURN_IF_ERROR(CudaStatus(error, "allocation of device memory"));
  memory.bytes_ = bytes;
  // A stream of this thread's own: others may be recording a graph.
  SLUICE_RETURN_IF_ERROR(
      CudaStatus(cudaMemsetAsync(memory.data_, 0, static_cast<size_t>(bytes), cudaStreamPerThread),
                 "zeroing of device memory"));
  SLUICE_RETURN_IF_ERROR(
      CudaStatus(cudaStreamSynchronize(cudaStreamPerThread), "zeroing of device memory"));
  return memory;
}

PinnedMemory& PinnedMemory::operator=(PinnedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

PinnedMemory::~PinnedMemory() {
  if (data_ != nullptr) static_cast<void>(cudaFreeHost(data_));
}

absl::StatusOr<PinnedMemory> PinnedMemory::Allocate(int64_t bytes) {
  SLUICE_CHECK(bytes >= 0) << bytes;
  PinnedMemory memory;
  if (bytes == 0) return memory;
  const cudaError_t error = cudaMallocHost(&memory.data_, static_cast<size_t>(bytes));
  if (error == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());
    memory.data_ = nullptr;
    return absl::ResourceExhaustedError(
        absl::StrCat("the host has no room for ", BytesText(bytes), " of pinned memory"));
  }
  SLUICE_RETURN_IF_ERROR(CudaStatus(error, "allocation of pinned memory"));
  memory.bytes_ = bytes;
  std::memset(memory.data_, 0, static_cast<size_t>(bytes));
  return memory;
}

}  // namespace sluice
