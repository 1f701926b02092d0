#include "services/convert/weight_rows.h"

#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"

namespace sluice::convert {
namespace {

float RoundTo(DType dtype, float value) {
  if (dtype == DType::kF16) return HalfToFloat(FloatToHalf(value));
  if (dtype == DType::kBF16) return BFloat16ToFloat(FloatToBFloat16(value));
  return value;
}

}  // namespace

WeightRows::WeightRows(const checkpoint::Checkpoint& source, int index)
    : source_(&source), index_(index) {
  const internal::v1::TensorSpec& spec = source.description().tensors(index);
  name_ = spec.name();
  n_ = static_cast<int64_t>(spec.n());
  k_ = static_cast<int64_t>(spec.k());
  plain_dtype_ = static_cast<DType>(spec.plain_dtype());
}

absl::StatusOr<WeightRows> WeightRows::Open(const checkpoint::Checkpoint& source, int index) {
  WeightRows rows(source, index);
  const auto format = static_cast<QuantFormat>(source.description().tensors(index).format());
  if (format != QuantFormat::kPlain) {
    SLUICE_ASSIGN_OR_RETURN(rows.matrix_, source.Read(index));
  }
  return rows;
}

absl::Status WeightRows::Read(int64_t first, int64_t count, DType dtype, float* out) const {
  const int64_t elements = count * k_;
  if (matrix_.has_value()) {
    for (int64_t row = 0; row < count; ++row) DequantizeRow(*matrix_, first + row, out + row * k_);
  } else {
    const uint64_t width = SizeOf(plain_dtype_);
    std::vector<uint8_t> bytes(static_cast<uint64_t>(elements) * width);
    SLUICE_RETURN_IF_ERROR(source_->ReadPlain(index_, static_cast<uint64_t>(first * k_) * width,
                                              bytes.size(), bytes.data()));
    ToFloat(plain_dtype_, bytes.data(), static_cast<size_t>(elements), out);
    if (plain_dtype_ == dtype) return absl::OkStatus();
  }
  for (int64_t i = 0; i < elements; ++i) {
    const float rounded = RoundTo(dtype, out[i]);
    if (!std::isfinite(rounded)) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", name_, "[", first + i / k_, ", ", i % k_, "] = ", out[i],
                       " does not fit in ", sluice::NameOf(dtype), "; use --to bf16 or fp32"));
    }
    out[i] = rounded;
  }
  return absl::OkStatus();
}

}  // namespace sluice::convert
