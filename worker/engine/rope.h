// RopeFrequencies: the inverse frequencies of the rotary embedding for every scaling type that
// Llama configs name. With d = head_dim and f_i = theta^(-2i/d), i = 0 .. d/2 - 1:
//
//   default   f_i
//   linear    f_i / factor
//   dynamic   theta' ^ (-2i/d),
//             theta' = theta * (factor * L / original - (factor - 1)) ^ (d / (d - 2)),
//             L = max(length, original), length = tokens of the sequence when the row is computed
//   llama3    with the wavelength w = 2 pi / f_i:
//             w < original / high: f_i;   w > original / low: f_i / factor;
//             between: ((1 - s) / factor + s) * f_i, s = (original / w - low) / (high - low)
//
// Computed in double, kept as float. Immutable.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/sluice/internal/v1/shard.pb.h"

namespace sluice::worker {

class RopeFrequencies {
 public:
  // INVALID_ARGUMENT names the field of config.rope that breaks a rule. REQUIRES: head_dim even.
  static absl::StatusOr<RopeFrequencies> Create(const internal::v1::ModelConfig& config);

  int64_t half_dim() const { return static_cast<int64_t>(base_.size()); }

  // Frequencies [half_dim] of a row of a sequence of `length` tokens: max(prompt_len, position +
  // 1), so that all rows of a prompt turn alike however it is cut into chunks. Points to this
  // object, or to `scratch` [half_dim] when they had to be computed (dynamic, beyond the original
  // length).
  const float* ForLength(uint32_t length, float* scratch) const;

  // False: ForLength never touches its scratch.
  bool depends_on_length() const { return dynamic_; }

 private:
  std::vector<float> base_;
  bool dynamic_ = false;
  double theta_ = 0;
  double factor_ = 1;
  uint32_t original_ = 0;
};

}  // namespace sluice::worker
