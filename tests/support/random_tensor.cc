#include "tests/support/random_tensor.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace sluice {

void StoreFloat(DType dtype, uint8_t* plane, int64_t index, float value) {
  if (dtype == DType::kF32) {
    std::memcpy(plane + 4 * index, &value, 4);
    return;
  }
  const uint16_t bits = dtype == DType::kF16 ? FloatToHalf(value) : FloatToBFloat16(value);
  std::memcpy(plane + 2 * index, &bits, 2);
}

QuantizedMatrix PlainMatrix(int64_t n, int64_t k, const std::vector<float>& values) {
  QuantSpec spec;
  spec.plain_dtype = DType::kF32;
  spec.n = n;
  spec.k = k;
  QuantizedMatrix matrix(spec);
  std::memcpy(matrix.codes(), values.data(), values.size() * sizeof(float));
  return matrix;
}

float RandomTensors::Normal(float deviation) {
  return std::normal_distribution<float>(0.0f, deviation)(engine_);
}

std::vector<float> RandomTensors::Normals(int64_t count, float deviation) {
  std::vector<float> values(count);
  for (float& value : values) value = Normal(deviation);
  return values;
}

uint32_t RandomTensors::Below(uint32_t end) {
  return std::uniform_int_distribution<uint32_t>(0, end - 1)(engine_);
}

QuantizedMatrix RandomTensors::Vector(int64_t size, float mean) {
  std::vector<float> values = Normals(size, 0.3f);
  for (float& value : values) value += mean;
  return PlainMatrix(1, size, values);
}

QuantizedMatrix RandomTensors::Matrix(const QuantSpec& spec) {
  QuantizedMatrix matrix(spec);
  const float size = 1.0f / std::sqrt(static_cast<float>(spec.k));
  if (spec.format == QuantFormat::kPlain) {
    for (int64_t i = 0; i < spec.n * spec.k; ++i) {
      StoreFloat(spec.plain_dtype, matrix.codes(), i, Normal(size));
    }
    return matrix;
  }
  const PlaneSizes sizes = SizesOf(spec);
  for (uint64_t i = 0; i < sizes.codes; ++i) matrix.codes()[i] = static_cast<uint8_t>(Below(256));
  const float code_size = spec.format == QuantFormat::kInt8     ? 64.0f
                          : spec.format == QuantFormat::kTable4 ? 1.0f
                                                                : 4.0f;
  for (int64_t i = 0; i < spec.n * spec.groups(); ++i) {
    const float scale = Below(32) == 0 ? 0.0f : std::abs(Normal(size / code_size));
    StoreFloat(spec.scale_dtype, matrix.scales(), i, scale);
    if (sizes.zeros != 0) matrix.zeros()[i] = static_cast<uint8_t>(Below(17));
    if (sizes.offsets != 0)
      StoreFloat(spec.scale_dtype, matrix.offsets(), i, -8.0f * scale + Normal(0.01f * size));
  }
  if (sizes.table != 0) {
    float table[16];
    for (float& value : table) value = Normal();
    std::memcpy(matrix.table(), table, sizeof(table));
  }
  if (spec.has_perm) {
    std::vector<int32_t> perm(spec.k);
    std::iota(perm.begin(), perm.end(), 0);
    std::shuffle(perm.begin(), perm.end(), engine_);
    std::memcpy(matrix.perm(), perm.data(), perm.size() * sizeof(int32_t));
  }
  return matrix;
}

}  // namespace sluice
