// Rows of one tensor of a checkpoint as numbers, whatever its format.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "services/checkpoint/checkpoint.h"

namespace sluice::convert {

// Plain tensors are read in slabs, quantized ones in one piece when the object is made. Refers to the
// checkpoint, which outlives it. One thread.
class WeightRows {
 public:
  // Tensor number `index` of source.description().tensors(). The errors of Checkpoint::Read().
  static absl::StatusOr<WeightRows> Open(const checkpoint::Checkpoint& source, int index);

  int64_t n() const { return n_; }
  int64_t k() const { return k_; }
  const std::string& name() const { return name_; }

  // Rows [first, first + count) as [count, k], each value rounded to `dtype` (kF16, kBF16 or kF32).
  // INVALID_ARGUMENT, naming tensor and place, when one is too large for it.
  absl::Status Read(int64_t first, int64_t count, DType dtype, float* out) const;

 private:
  WeightRows(const checkpoint::Checkpoint& source, int index);

  const checkpoint::Checkpoint* source_;
  int index_;
  std::string name_;
  int64_t n_, k_;
  DType plain_dtype_ = DType::kF16;
  std::optional<QuantizedMatrix> matrix_;  // Of a quantized tensor
};

}  // namespace sluice::convert
