// What tests of CUDA kernels share: a fixture that skips without a GPU, arrays in device memory with
// poisoned contents, and half-precision values in float.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/core/dtype.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/memory.h"

namespace sluice {

// A test that needs a GPU: `context_` launches on a stream of its own.
class DeviceTest : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no GPU";
    ASSERT_EQ(cudaStreamCreateWithFlags(&context_.stream, cudaStreamNonBlocking), cudaSuccess);
    int major = 0;
    cudaDeviceGetAttribute(&context_.num_sms, cudaDevAttrMultiProcessorCount, 0);
    cudaDeviceGetAttribute(&context_.max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
    context_.dependent_launch = major >= 9;
  }
  void TearDown() override {
    if (context_.stream == nullptr) return;
    EXPECT_EQ(cudaStreamDestroy(context_.stream), cudaSuccess);
  }
  void Wait() { ASSERT_EQ(cudaStreamSynchronize(context_.stream), cudaSuccess); }

  LaunchContext context_;
};

// `count` elements of T in device memory.
template <typename T>
class DeviceArray {
 public:
  // All bytes 0xff: NaN in every float format, -1 in every integer.
  explicit DeviceArray(size_t count) : count_(count) {
    auto memory = DeviceMemory::Allocate(static_cast<int64_t>(count * sizeof(T)));
    EXPECT_TRUE(memory.ok()) << memory.status().ToString();
    memory_ = *std::move(memory);
    EXPECT_EQ(cudaMemset(memory_.data(), 0xff, count * sizeof(T)), cudaSuccess);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { Put(values); }

  void Put(const std::vector<T>& values) const {
    ASSERT_LE(values.size(), count_);
    ASSERT_EQ(cudaMemcpy(memory_.data(), values.data(), values.size() * sizeof(T),
                         cudaMemcpyHostToDevice),
              cudaSuccess);
  }
  std::vector<T> Get() const {
    std::vector<T> values(count_);
    EXPECT_EQ(cudaMemcpy(values.data(), memory_.data(), count_ * sizeof(T), cudaMemcpyDeviceToHost),
              cudaSuccess);
    return values;
  }
  T* data() const { return memory_.as<T>(); }

 private:
  size_t count_;
  DeviceMemory memory_;
};

inline uint16_t FromFloat(DType dtype, float value) {
  return dtype == DType::kF16 ? FloatToHalf(value) : FloatToBFloat16(value);
}
inline float ToFloat(DType dtype, uint16_t bits) {
  return dtype == DType::kF16 ? HalfToFloat(bits) : BFloat16ToFloat(bits);
}
// Half a unit in the last place, relative.
inline double RoundingOf(DType dtype) { return dtype == DType::kF16 ? 0x1p-11 : 0x1p-8; }
inline constexpr uint16_t kPoison = 0xffff;

// Normally distributed elements of dtype.
inline std::vector<uint16_t> RandomElements(DType dtype, size_t count, std::mt19937& random,
                                            float deviation = 1.0f) {
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<uint16_t> values(count);
  for (uint16_t& value : values) value = FromFloat(dtype, normal(random));
  return values;
}
inline std::vector<float> RandomFloats(size_t count, std::mt19937& random, float deviation = 1.0f) {
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// A host array of rows `stride` apart as doubles.
struct HostRows {
  DType dtype;
  const std::vector<uint16_t>& values;
  int64_t stride;
  double At(int64_t row, int64_t column) const {
    return ToFloat(dtype, values[row * stride + column]);
  }
};

}  // namespace sluice
