// Random inputs for kernel tests: every value comes from the seed, so a failure can be repeated.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "kernels/quant.h"

namespace sluice {

class RandomTensors {
 public:
  explicit RandomTensors(uint64_t seed) : engine_(seed) {}

  // Normally distributed with mean 0.
  float Normal(float deviation = 1.0f);
  std::vector<float> Normals(int64_t count, float deviation = 1.0f);
  // Uniform in [0, end).
  uint32_t Below(uint32_t end);

  // A matrix of the spec with values that CheckValues allows: weights of about 1 / sqrt(k), all
  // codes and zeros in use, some scales 0. REQUIRES: CheckSpec(spec) is OK.
  QuantizedMatrix Matrix(const QuantSpec& spec);
  // A plain float32 vector (n = 1).
  QuantizedMatrix Vector(int64_t size, float mean = 0.0f);

 private:
  std::mt19937_64 engine_;
};

// A plain float32 matrix of these values, row-major.
QuantizedMatrix PlainMatrix(int64_t n, int64_t k, const std::vector<float>& values);

// Writes `value` as element `index` of a plane of `dtype`.
void StoreFloat(DType dtype, uint8_t* plane, int64_t index, float value);

}  // namespace sluice
