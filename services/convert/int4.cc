#include "services/convert/int4.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/core/check.h"
#include "kernels/core/status_macros.h"

namespace sluice::convert {
namespace {

constexpr int64_t kPerWord = 8;
constexpr float kMaxCode = 15;
constexpr int64_t kSlabElements = 1 << 20;
constexpr uint16_t kLeastScale = 1;                             // 2^-24 in float16
constexpr int kAwqNibble[kPerWord] = {0, 4, 1, 5, 2, 6, 3, 7};  // Of output 8c + j

// [groups, n] from the canonical [n, groups].
template <typename T>
Bytes Transposed(const uint8_t* plane, int64_t n, int64_t groups) {
  Bytes out(static_cast<size_t>(n * groups) * sizeof(T));
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      std::memcpy(&out[(g * n + row) * sizeof(T)], plane + (row * groups + g) * sizeof(T),
                  sizeof(T));
    }
  }
  return out;
}

void PutWord(uint32_t word, int64_t index, Bytes* out) {
  std::memcpy(out->data() + 4 * index, &word, 4);
}

// Eight zeros of one group, of outputs 8w..8w+7, each in its nibble.
Bytes PackZeros(const QuantizedMatrix& matrix, const int* nibble, int subtract) {
  const int64_t groups = matrix.spec.groups(), words = matrix.spec.n / kPerWord;
  Bytes out(static_cast<size_t>(4 * groups * words));
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t w = 0; w < words; ++w) {
      uint32_t word = 0;
      for (int64_t i = 0; i < kPerWord; ++i) {
        const int zero = matrix.zeros()[(kPerWord * w + i) * groups + g] - subtract;
        SLUICE_CHECK(zero >= 0 && zero <= 15) << zero;
        word |= static_cast<uint32_t>(zero) << (4 * nibble[i]);
      }
      PutWord(word, g * words + w, &out);
    }
  }
  return out;
}

}  // namespace

Int4Group QuantizeGroup(const float* weights, int64_t count, bool symmetric, uint8_t* codes) {
  const auto [low, high] = std::minmax_element(weights, weights + count);
  float min = std::min(*low, 0.0F), max = std::max(*high, 0.0F);
  if (symmetric) {
    max = std::max(-min, max);
    min = -max;
  }
  if (min == max) {  // All zero: any scale will do
    min = -1;
    max = 1;
  }
  Int4Group group;
  group.scale = std::max(FloatToHalf((max - min) / kMaxCode), kLeastScale);
  const float scale = HalfToFloat(group.scale);
  if (!symmetric) {
    group.zero = static_cast<uint8_t>(std::clamp(std::nearbyint(-min / scale), 0.0F, kMaxCode));
  }
  const float zero = group.zero;
  for (int64_t i = 0; i < count; ++i) {
    codes[i] =
        static_cast<uint8_t>(std::clamp(std::nearbyint(weights[i] / scale) + zero, 0.0F, kMaxCode));
  }
  return group;
}

absl::StatusOr<QuantizedMatrix> QuantizeInt4(const WeightRows& rows, int64_t group_size,
                                             bool symmetric) {
  QuantSpec spec;
  spec.format = QuantFormat::kInt4Zero;
  spec.n = rows.n();
  spec.k = rows.k();
  spec.group_size = group_size;
  SLUICE_RETURN_IF_ERROR(CheckSpec(spec));
  QuantizedMatrix matrix(spec);
  const int64_t k = spec.k, groups = spec.groups();
  const int64_t slab = std::clamp<int64_t>(kSlabElements / k, 1, spec.n);
  std::vector<float> weights(static_cast<size_t>(slab * k));
  std::vector<uint8_t> codes(static_cast<size_t>(group_size));
  for (int64_t first = 0; first < spec.n; first += slab) {
    const int64_t count = std::min(slab, spec.n - first);
    SLUICE_RETURN_IF_ERROR(rows.Read(first, count, DType::kF16, weights.data()));
    for (int64_t g = 0; g < count * groups; ++g) {  // Groups divide rows: one after another
      const Int4Group group =
          QuantizeGroup(&weights[g * group_size], group_size, symmetric, codes.data());
      const int64_t index = first * groups + g;
      std::memcpy(matrix.scales() + 2 * index, &group.scale, 2);
      matrix.zeros()[index] = group.zero;
      uint8_t* out = matrix.codes() + index * group_size / 2;
      for (int64_t i = 0; i < group_size / 2; ++i) {
        out[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
      }
    }
  }
  return matrix;
}

std::vector<Bytes> PackGptq(const QuantizedMatrix& matrix, bool zeros_minus_one) {
  static constexpr int kInOrder[kPerWord] = {0, 1, 2, 3, 4, 5, 6, 7};
  const QuantSpec& spec = matrix.spec;
  const int64_t n = spec.n, words = spec.k / kPerWord;
  // A word holds 8 neighbours of one row, as the canonical codes do.
  Bytes qweight = Transposed<uint32_t>(matrix.codes(), n, words);
  Bytes scales = Transposed<uint16_t>(matrix.scales(), n, spec.groups());
  Bytes qzeros = PackZeros(matrix, kInOrder, zeros_minus_one ? 1 : 0);
  Bytes g_idx(static_cast<size_t>(4 * spec.k));
  for (int64_t i = 0; i < spec.k; ++i) {
    PutWord(static_cast<uint32_t>(i / spec.group_size), i, &g_idx);
  }
  return {std::move(qweight), std::move(scales), std::move(qzeros), std::move(g_idx)};
}

std::vector<Bytes> PackAwq(const QuantizedMatrix& matrix) {
  const QuantSpec& spec = matrix.spec;
  const int64_t n = spec.n, k = spec.k, words = n / kPerWord, row_bytes = k / 2;
  Bytes qweight(static_cast<size_t>(4 * k * words));
  for (int64_t word = 0; word < words; ++word) {
    for (int64_t column = 0; column < k; column += kPerWord) {
      uint32_t out[kPerWord] = {};
      for (int64_t j = 0; j < kPerWord; ++j) {
        uint32_t codes;  // Eight columns of output 8 * word + j
        std::memcpy(&codes, matrix.codes() + (kPerWord * word + j) * row_bytes + column / 2, 4);
        for (int64_t i = 0; i < kPerWord; ++i) {
          out[i] |= (codes >> (4 * i) & 15) << (4 * kAwqNibble[j]);
        }
      }
      for (int64_t i = 0; i < kPerWord; ++i) PutWord(out[i], (column + i) * words + word, &qweight);
    }
  }
  return {std::move(qweight), Transposed<uint16_t>(matrix.scales(), n, spec.groups()),
          PackZeros(matrix, kAwqNibble, 0)};
}

}  // namespace sluice::convert
