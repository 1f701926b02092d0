#include "tests/support/reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace sluice {
namespace {

// |scale| * code + |offset|: what the roundings of a kInt4Offset weight are relative to, which may
// be far larger than the weight itself.
std::vector<float> Magnitudes(const QuantizedMatrix& matrix, int64_t row,
                              const std::vector<float>& weights) {
  std::vector<float> magnitudes = weights;
  if (matrix.spec.format == QuantFormat::kInt4Offset) {
    QuantizedMatrix one(QuantSpec{matrix.spec});
    std::memcpy(one.planes.data(), matrix.planes.data(), matrix.planes.size());
    const int64_t element = static_cast<int64_t>(SizeOf(matrix.spec.scale_dtype));
    const int64_t begin = row * matrix.spec.groups();
    for (int64_t i = begin; i < begin + matrix.spec.groups(); ++i) {
      one.scales()[(i + 1) * element - 1] &=
          0x7f;  // Sign bit of a little-endian float of any width
      one.offsets()[(i + 1) * element - 1] &= 0x7f;
    }
    DequantizeRow(one, row, magnitudes.data());
  }
  for (float& magnitude : magnitudes) magnitude = std::abs(magnitude);
  return magnitudes;
}

// Half the gap between floats near 0 covers results that underflow.
constexpr double kTiny = 0x1p-126;

double Silu(double x) { return x / (1.0 + std::exp(-x)); }

}  // namespace

double Gamma(int64_t n) {
  return static_cast<double>(n) * kUnit / (1.0 - static_cast<double>(n) * kUnit);
}

BoundedRow Exactly(const float* values, int64_t count) {
  BoundedRow row(count);
  for (int64_t i = 0; i < count; ++i) row[i].value = values[i];
  return row;
}

Bounded Add(Bounded a, Bounded b) {
  const double value = a.value + b.value;
  const double bound = a.bound + b.bound;
  return {value, bound + kUnit * (std::abs(value) + bound)};
}

Bounded Multiply(Bounded a, Bounded b) {
  const double value = a.value * b.value;
  const double bound =
      std::abs(a.value) * b.bound + std::abs(b.value) * a.bound + a.bound * b.bound;
  return {value, bound + kUnit * (std::abs(value) + bound) + kTiny};
}

BoundedRow ReferenceNorm(NormKind kind, const BoundedRow& x, const float* weight, const float* bias,
                         float eps) {
  if (kind == NormKind::kNone) return x;
  const int64_t k = static_cast<int64_t>(x.size());
  double mean = 0, mean_of_absolutes = 0, squares = 0;
  for (const Bounded& element : x) {
    mean += element.value / static_cast<double>(k);
    mean_of_absolutes += std::abs(element.value) / static_cast<double>(k);
  }
  if (kind == NormKind::kRms) mean = mean_of_absolutes = 0;
  for (const Bounded& element : x) squares += (element.value - mean) * (element.value - mean);
  const double inverse =
      1.0 / std::sqrt(squares / static_cast<double>(k) + static_cast<double>(eps));
  // The computed mean errs by up to Gamma(k + 1) times the mean of absolutes, which shifts every
  // centred element. The sum of squares errs by Gamma(k + 2) relative, and by twice the shift over
  // the deviation; the root halves both.
  const double shift = Gamma(k + 1) * mean_of_absolutes;
  const double relative = Gamma(k + 8) + shift * inverse;
  BoundedRow y(k);
  for (int64_t i = 0; i < k; ++i) {
    const double centred = x[i].value - mean;
    y[i] = {centred * inverse,
            (std::abs(centred) * relative + shift + kUnit * std::abs(centred)) * inverse};
    if (weight != nullptr) y[i] = Multiply(y[i], {weight[i], 0});
    if (bias != nullptr) y[i] = Add(y[i], {bias[i], 0});
  }
  return y;
}

BoundedRow ReferenceMatMul(const BoundedRow& x, const std::vector<const QuantizedMatrix*>& stacked,
                           const float* bias) {
  BoundedRow y;
  for (const QuantizedMatrix* matrix : stacked) {
    const int64_t k = matrix->spec.k;
    std::vector<float> weights(k);
    for (int64_t row = 0; row < matrix->spec.n; ++row) {
      DequantizeRow(*matrix, row, weights.data());
      const std::vector<float> magnitudes = Magnitudes(*matrix, row, weights);
      Bounded sum;
      for (int64_t i = 0; i < k; ++i) {
        sum.value += x[i].value * static_cast<double>(weights[i]);
        // k additions, and up to two roundings of the weight.
        sum.bound += (Gamma(k + 2) * (std::abs(x[i].value) + x[i].bound) + x[i].bound) *
                     static_cast<double>(magnitudes[i]);
      }
      y.push_back(bias == nullptr ? sum : Add(sum, {bias[y.size()], 0}));
    }
  }
  return y;
}

Bounded ReferenceActivation(Activation act, Bounded x) {
  constexpr double kSteepest = 1.13;  // Largest slope of the four functions
  constexpr double kSteps =
      12;  // Roundings on the way: exponential (2), sums, quotient, products, and the constants
  double value = x.value;
  switch (act) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return {std::max(x.value, 0.0), x.bound};
    case Activation::kSilu:
      value = Silu(x.value);
      break;
    case Activation::kGelu:
      value = 0.5 * x.value * (1.0 + std::erf(x.value * std::sqrt(0.5)));
      break;
    case Activation::kGeluTanh: {
      const double inner =
          std::sqrt(2.0 / M_PI) * (x.value + 0.044715 * x.value * x.value * x.value);
      value = 0.5 * x.value * (1.0 + std::tanh(inner));
      break;
    }
  }
  // An error in the argument of the exponential, or of erf's cancellation, is absolute: relative to
  // x, not to the value.
  return {value,
          kSteepest * x.bound + kSteps * kUnit * (std::abs(value) + std::abs(x.value)) + kTiny};
}

BoundedRow ReferenceAttention(const float* q, const std::vector<const float*>& keys,
                              const std::vector<const float*>& values, int64_t head_dim,
                              float scale) {
  const size_t count = keys.size();
  std::vector<double> scores(count, 0.0);
  double score_bound = 0;
  double highest = -INFINITY, lowest = INFINITY;
  for (size_t j = 0; j < count; ++j) {
    double absolutes = 0;
    for (int64_t i = 0; i < head_dim; ++i) {
      const double product = static_cast<double>(q[i]) * static_cast<double>(keys[j][i]);
      scores[j] += product;
      absolutes += std::abs(product);
    }
    scores[j] *= static_cast<double>(scale);
    score_bound =
        std::max(score_bound, Gamma(head_dim + 1) * absolutes * static_cast<double>(scale));
    highest = std::max(highest, scores[j]);
    lowest = std::min(lowest, scores[j]);
  }
  // A weight e^(s - max) errs by the errors of both scores, the rounding of the difference and that
  // of the exponential.
  const double exponent = 2 * score_bound + kUnit * (highest - lowest);
  double relative = std::expm1(exponent) + 2 * kUnit;
  double total = 0;
  for (double& score : scores) total += score = std::exp(score - highest);
  // Numerator and denominator each carry it once, with their own sums of `count` terms.
  relative = 2 * (relative + Gamma(static_cast<int64_t>(count) + 4));
  BoundedRow out(head_dim);
  for (int64_t i = 0; i < head_dim; ++i) {
    double absolutes = 0;
    for (size_t j = 0; j < count; ++j) {
      out[i].value += scores[j] / total * static_cast<double>(values[j][i]);
      absolutes += scores[j] / total * std::abs(static_cast<double>(values[j][i]));
    }
    out[i].bound = relative * absolutes + kTiny;
  }
  return out;
}

}  // namespace sluice
