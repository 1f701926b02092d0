#include "kernels/quant.h"

#include <cmath>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"

namespace sluice {
namespace {

bool IsFloating(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16;
}

bool IsFourBit(QuantFormat format) {
  return format == QuantFormat::kInt4Zero || format == QuantFormat::kInt4Offset ||
         format == QuantFormat::kTable4;
}

float ReadFloat(DType dtype, const uint8_t* plane, int64_t index) {
  float value;
  ToFloat(dtype, plane + index * static_cast<int64_t>(SizeOf(dtype)), 1, &value);
  return value;
}

absl::Status CheckFinite(const char* plane, DType dtype, const uint8_t* data, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(ReadFloat(dtype, data, i))) {
      return absl::InvalidArgumentError(
          absl::StrCat(plane, "[", i, "] is not finite; the weights are damaged"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckPermutation(const int32_t* perm, int64_t k) {
  std::vector<bool> seen(k, false);
  for (int64_t i = 0; i < k; ++i) {
    if (perm[i] < 0 || perm[i] >= k || seen[perm[i]]) {
      return absl::InvalidArgumentError(
          absl::StrCat("perm[", i, "] = ", perm[i], " makes it no permutation of 0..", k - 1));
    }
    seen[perm[i]] = true;
  }
  return absl::OkStatus();
}

}  // namespace

const char* NameOf(QuantFormat format) {
  switch (format) {
    case QuantFormat::kPlain:
      return "plain";
    case QuantFormat::kInt4Zero:
      return "int4_zero";
    case QuantFormat::kInt4Offset:
      return "int4_offset";
    case QuantFormat::kTable4:
      return "table4";
    case QuantFormat::kInt8:
      return "int8";
  }
  return "unknown";
}

absl::Status CheckSpec(const QuantSpec& spec) {
  constexpr int64_t kMaxDim = (int64_t{1} << 31) - 1;
  constexpr uint64_t kMaxBytes = uint64_t{1} << 48;
  if (spec.n < 1 || spec.n > kMaxDim || spec.k < 1 || spec.k > kMaxDim) {
    return absl::InvalidArgumentError(
        absl::StrCat("shape [", spec.n, ", ", spec.k, "] is out of range 1..2^31-1"));
  }
  if (spec.format == QuantFormat::kPlain) {
    if (!IsFloating(spec.plain_dtype)) {
      return absl::InvalidArgumentError(
          absl::StrCat("a plain matrix cannot hold ", NameOf(spec.plain_dtype)));
    }
    if (spec.has_perm) return absl::InvalidArgumentError("a plain matrix has no act-order");
  } else {
    if (!IsFloating(spec.scale_dtype)) {
      return absl::InvalidArgumentError(
          absl::StrCat("scales cannot be ", NameOf(spec.scale_dtype)));
    }
    if (spec.group_size < 1 || spec.group_size > spec.k) {
      return absl::InvalidArgumentError(
          absl::StrCat("group size ", spec.group_size, " is out of range 1..", spec.k));
    }
  }
  // n and k are below 2^31 and an element takes at most 14 bytes in all planes: no overflow in 64
  // bits up to here.
  const double bytes = static_cast<double>(spec.n) * static_cast<double>(spec.k) * 14.0;
  if (bytes > 1.8e19 || SizesOf(spec).total() > kMaxBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("shape [", spec.n, ", ", spec.k, "] needs more than 2^48 bytes"));
  }
  return absl::OkStatus();
}

PlaneSizes SizesOf(const QuantSpec& spec) {
  const auto n = static_cast<uint64_t>(spec.n);
  const auto k = static_cast<uint64_t>(spec.k);
  PlaneSizes sizes;
  if (spec.format == QuantFormat::kPlain) {
    sizes.codes = n * k * SizeOf(spec.plain_dtype);
    return sizes;
  }
  const uint64_t scaled = n * static_cast<uint64_t>(spec.groups());
  sizes.codes = IsFourBit(spec.format) ? n * ((k + 1) / 2) : n * k;
  sizes.scales = scaled * SizeOf(spec.scale_dtype);
  if (spec.format == QuantFormat::kInt4Zero) sizes.zeros = scaled;
  if (spec.format == QuantFormat::kInt4Offset) sizes.offsets = scaled * SizeOf(spec.scale_dtype);
  if (spec.format == QuantFormat::kTable4) sizes.table = 16 * sizeof(float);
  if (spec.has_perm) sizes.perm = k * sizeof(int32_t);
  return sizes;
}

QuantizedMatrix::QuantizedMatrix(const QuantSpec& s) : spec(s), planes(SizesOf(s).total()) {}

const uint8_t* QuantizedMatrix::scales() const { return planes.data() + SizesOf(spec).codes; }
const uint8_t* QuantizedMatrix::zeros() const { return scales() + SizesOf(spec).scales; }
const uint8_t* QuantizedMatrix::offsets() const { return zeros() + SizesOf(spec).zeros; }
const float* QuantizedMatrix::table() const {
  return reinterpret_cast<const float*>(offsets() + SizesOf(spec).offsets);
}
const int32_t* QuantizedMatrix::perm() const {
  return reinterpret_cast<const int32_t*>(offsets() + SizesOf(spec).offsets + SizesOf(spec).table);
}
uint8_t* QuantizedMatrix::scales() { return planes.data() + SizesOf(spec).codes; }
uint8_t* QuantizedMatrix::zeros() { return scales() + SizesOf(spec).scales; }
uint8_t* QuantizedMatrix::offsets() { return zeros() + SizesOf(spec).zeros; }
float* QuantizedMatrix::table() {
  return reinterpret_cast<float*>(offsets() + SizesOf(spec).offsets);
}
int32_t* QuantizedMatrix::perm() {
  return reinterpret_cast<int32_t*>(offsets() + SizesOf(spec).offsets + SizesOf(spec).table);
}

absl::Status CheckValues(const QuantizedMatrix& matrix) {
  const QuantSpec& spec = matrix.spec;
  if (spec.format == QuantFormat::kPlain) {
    return CheckFinite("weight", spec.plain_dtype, matrix.codes(), spec.n * spec.k);
  }
  const int64_t scaled = spec.n * spec.groups();
  if (absl::Status s = CheckFinite("scales", spec.scale_dtype, matrix.scales(), scaled); !s.ok()) {
    return s;
  }
  if (spec.format == QuantFormat::kInt4Zero) {
    for (int64_t i = 0; i < scaled; ++i) {
      if (matrix.zeros()[i] > 16) {
        return absl::InvalidArgumentError(
            absl::StrCat("zeros[", i, "] = ", matrix.zeros()[i], " is above 16"));
      }
    }
  }
  if (spec.format == QuantFormat::kInt4Offset) {
    if (absl::Status s = CheckFinite("offsets", spec.scale_dtype, matrix.offsets(), scaled);
        !s.ok()) {
      return s;
    }
  }
  if (spec.format == QuantFormat::kTable4) {
    float table[16];
    std::memcpy(table, matrix.table(), sizeof(table));
    for (float value : table) {
      if (!std::isfinite(value)) {
        return absl::InvalidArgumentError("table holds a value that is not finite");
      }
    }
  }
  if (!spec.has_perm) return absl::OkStatus();
  std::vector<int32_t> perm(spec.k);
  std::memcpy(perm.data(), matrix.perm(), spec.k * sizeof(int32_t));
  return CheckPermutation(perm.data(), spec.k);
}

namespace {

// The weight of code index `column` in plane order.
float DequantizeOne(const QuantizedMatrix& matrix, int64_t row, int64_t column) {
  const QuantSpec& spec = matrix.spec;
  if (spec.format == QuantFormat::kPlain) {
    return ReadFloat(spec.plain_dtype, matrix.codes(), row * spec.k + column);
  }
  const int64_t group = row * spec.groups() + column / spec.group_size;
  const float scale = ReadFloat(spec.scale_dtype, matrix.scales(), group);
  if (spec.format == QuantFormat::kInt8) {
    return scale * static_cast<float>(static_cast<int8_t>(matrix.codes()[row * spec.k + column]));
  }
  const uint8_t byte = matrix.codes()[row * ((spec.k + 1) / 2) + column / 2];
  const int code = column % 2 == 0 ? byte & 15 : byte >> 4;
  if (spec.format == QuantFormat::kInt4Zero) {
    return scale * static_cast<float>(code - matrix.zeros()[group]);
  }
  if (spec.format == QuantFormat::kInt4Offset) {
    return scale * static_cast<float>(code) + ReadFloat(spec.scale_dtype, matrix.offsets(), group);
  }
  float value;
  std::memcpy(&value, matrix.table() + code, sizeof(value));
  return value * scale;
}

}  // namespace

void DequantizeRow(const QuantizedMatrix& matrix, int64_t row, float* out) {
  SLUICE_CHECK(row >= 0 && row < matrix.spec.n) << row;
  for (int64_t i = 0; i < matrix.spec.k; ++i) {
    int32_t column = static_cast<int32_t>(i);
    if (matrix.spec.has_perm) std::memcpy(&column, matrix.perm() + i, sizeof(column));
    out[column] = DequantizeOne(matrix, row, i);
  }
}

}  // namespace sluice
