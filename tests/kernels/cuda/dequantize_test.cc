// DequantizeOnDevice against DequantizeRow, bit for bit: formats x scale dtypes x shapes with every
// kind of remainder x act-order.
#include "kernels/cuda/dequantize.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"

namespace sluice {
namespace {

struct Shape {
  int64_t n, k, group_size;
};

void PutFloat(DType dtype, float value, uint8_t* plane, int64_t index) {
  if (dtype == DType::kF32) {
    std::memcpy(plane + 4 * index, &value, 4);
    return;
  }
  const uint16_t bits = dtype == DType::kF16 ? FloatToHalf(value) : FloatToBFloat16(value);
  std::memcpy(plane + 2 * index, &bits, 2);
}

QuantizedMatrix RandomMatrix(const QuantSpec& spec, std::mt19937* random) {
  QuantizedMatrix matrix(spec);
  const PlaneSizes sizes = SizesOf(spec);
  std::uniform_real_distribution<float> scale(-0.1f, 0.1f);
  for (uint64_t i = 0; i < sizes.codes; ++i) matrix.codes()[i] = static_cast<uint8_t>((*random)());
  for (int64_t i = 0; i < spec.n * spec.groups(); ++i) {
    PutFloat(spec.scale_dtype, scale(*random), matrix.scales(), i);
    if (sizes.offsets > 0) PutFloat(spec.scale_dtype, scale(*random), matrix.offsets(), i);
    if (sizes.zeros > 0) matrix.zeros()[i] = static_cast<uint8_t>((*random)() % 17);
  }
  if (sizes.table > 0) {
    for (int i = 0; i < 16; ++i) {
      PutFloat(DType::kF32, scale(*random) * 10, reinterpret_cast<uint8_t*>(matrix.table()), i);
    }
  }
  if (sizes.perm > 0) {
    std::vector<int32_t> perm(spec.k);
    std::iota(perm.begin(), perm.end(), 0);
    std::shuffle(perm.begin(), perm.end(), *random);
    std::memcpy(matrix.perm(), perm.data(), sizes.perm);
  }
  return matrix;
}

// Device memory for the length of a test.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) { EXPECT_EQ(cudaMalloc(&data_, bytes), cudaSuccess); }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  void* data() { return data_; }

 private:
  void* data_ = nullptr;
};

using Case = std::tuple<QuantFormat, DType, Shape, bool>;

class CudaDequantizeTest : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no GPU";
  }
};

TEST_P(CudaDequantizeTest, HasTheBitsOfTheHost) {
  const auto [format, scale_dtype, shape, has_perm] = GetParam();
  QuantSpec spec;
  spec.format = format;
  spec.scale_dtype = scale_dtype;
  spec.n = shape.n;
  spec.k = shape.k;
  spec.group_size = shape.group_size;
  spec.has_perm = has_perm;
  ASSERT_TRUE(CheckSpec(spec).ok());
  std::mt19937 random(7);
  const QuantizedMatrix matrix = RandomMatrix(spec, &random);

  const size_t count = spec.n * spec.k;
  DeviceMemory planes(matrix.planes.size());
  DeviceMemory out(count * sizeof(uint16_t));
  ASSERT_EQ(
      cudaMemcpy(planes.data(), matrix.planes.data(), matrix.planes.size(), cudaMemcpyHostToDevice),
      cudaSuccess);
  const absl::Status status =
      DequantizeOnDevice(spec, planes.data(), static_cast<__half*>(out.data()), /*stream=*/nullptr);
  ASSERT_TRUE(status.ok()) << status.ToString();
  std::vector<uint16_t> got(count);
  ASSERT_EQ(cudaMemcpy(got.data(), out.data(), count * sizeof(uint16_t), cudaMemcpyDeviceToHost),
            cudaSuccess);

  std::vector<float> row(spec.k);
  for (int64_t r = 0; r < spec.n; ++r) {
    DequantizeRow(matrix, r, row.data());
    for (int64_t c = 0; c < spec.k; ++c) {
      ASSERT_EQ(got[r * spec.k + c], FloatToHalf(row[c]))
          << "row " << r << " column " << c << ": " << row[c];
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Sweep, CudaDequantizeTest,
    testing::Combine(testing::Values(QuantFormat::kInt4Zero, QuantFormat::kInt4Offset,
                                     QuantFormat::kTable4, QuantFormat::kInt8),
                     testing::Values(DType::kF16, DType::kBF16, DType::kF32),
                     testing::Values(Shape{1, 1, 1}, Shape{3, 7, 4}, Shape{2, 40, 40},
                                     Shape{5, 576, 64}, Shape{4, 578, 32}, Shape{3, 4096, 128},
                                     Shape{2, 24, 12}),
                     testing::Bool()));

}  // namespace
}  // namespace sluice
