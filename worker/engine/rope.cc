#include "worker/engine/rope.h"

#include <cmath>
#include <numbers>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"

namespace sluice::worker {
namespace {

using internal::v1::ModelConfig;
using internal::v1::RopeConfig;

absl::Status CheckPositive(const char* field, double value) {
  if (std::isfinite(value) && value > 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("config.rope.", field, " = ", value, " must be finite and above 0"));
}

absl::Status CheckRope(const RopeConfig& rope, uint32_t head_dim) {
  const std::string& type = rope.type();
  if (type != "default" && type != "linear" && type != "dynamic" && type != "llama3") {
    return absl::InvalidArgumentError(absl::StrCat(
        "config.rope.type = \"", type, "\" must be default, linear, dynamic or llama3"));
  }
  SLUICE_RETURN_IF_ERROR(CheckPositive("theta", rope.theta()));
  if (type == "default") return absl::OkStatus();
  SLUICE_RETURN_IF_ERROR(CheckPositive("factor", rope.factor()));
  if (type == "linear") return absl::OkStatus();
  SLUICE_RETURN_IF_ERROR(
      CheckPositive("original_max_position_embeddings", rope.original_max_position_embeddings()));
  if (type == "dynamic") {
    if (rope.factor() < 1 || head_dim <= 2) {
      return absl::InvalidArgumentError(
          "config.rope: dynamic scaling needs factor >= 1 and head_dim > 2");
    }
    return absl::OkStatus();
  }
  SLUICE_RETURN_IF_ERROR(CheckPositive("low_freq_factor", rope.low_freq_factor()));
  if (!(rope.high_freq_factor() > rope.low_freq_factor())) {
    return absl::InvalidArgumentError(
        "config.rope.high_freq_factor must be above config.rope.low_freq_factor");
  }
  return absl::OkStatus();
}

double Frequency(double theta, int64_t i, int64_t half_dim) {
  return std::pow(theta, -static_cast<double>(i) / static_cast<double>(half_dim));
}

double ScaleLlama3(const RopeConfig& rope, double frequency) {
  const double original = rope.original_max_position_embeddings();
  const double wavelength = 2 * std::numbers::pi / frequency;
  if (wavelength < original / rope.high_freq_factor()) return frequency;
  if (wavelength > original / rope.low_freq_factor()) return frequency / rope.factor();
  const double smooth = (original / wavelength - rope.low_freq_factor()) /
                        (rope.high_freq_factor() - rope.low_freq_factor());
  return ((1 - smooth) / rope.factor() + smooth) * frequency;
}

}  // namespace

absl::StatusOr<RopeFrequencies> RopeFrequencies::Create(const ModelConfig& config) {
  const RopeConfig& rope = config.rope();
  SLUICE_RETURN_IF_ERROR(CheckRope(rope, config.head_dim()));
  RopeFrequencies result;
  result.theta_ = rope.theta();
  result.dynamic_ = rope.type() == "dynamic";
  result.factor_ = rope.factor();
  result.original_ = rope.original_max_position_embeddings();
  const int64_t half_dim = config.head_dim() / 2;
  for (int64_t i = 0; i < half_dim; ++i) {
    double frequency = Frequency(rope.theta(), i, half_dim);
    if (rope.type() == "linear") frequency /= rope.factor();
    if (rope.type() == "llama3") frequency = ScaleLlama3(rope, frequency);
    result.base_.push_back(static_cast<float>(frequency));
  }
  return result;
}

const float* RopeFrequencies::ForLength(uint32_t length, float* scratch) const {
  if (!dynamic_ || length <= original_) return base_.data();
  const double dim = 2.0 * static_cast<double>(half_dim());
  const double stretch = factor_ * length / original_ - (factor_ - 1);
  const double theta = theta_ * std::pow(stretch, dim / (dim - 2));
  for (int64_t i = 0; i < half_dim(); ++i) {
    scratch[i] = static_cast<float>(Frequency(theta, i, half_dim()));
  }
  return scratch;
}

}  // namespace sluice::worker
