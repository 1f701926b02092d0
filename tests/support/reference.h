// The operations of kernels/backend.h in double, one plain loop each, with a bound on the error of
// any float32 computation that follows the formula. Bounds come from the standard model of rounding
// (each operation errs by at most kUnit relative); a bound of an op takes the bound of its input
// into account.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/quant.h"

namespace sluice {

constexpr double kUnit = 0x1p-24;  // Half the distance of floats around 1

// Relative error of a sum or product of n rounded steps: n u / (1 - n u).
double Gamma(int64_t n);

// A value and how far a float32 result may be from it.
struct Bounded {
  double value = 0;
  double bound = 0;
};
using BoundedRow = std::vector<Bounded>;

BoundedRow Exactly(const float* values, int64_t count);

// Weight and bias null or of the row's size; kNone gives the row itself.
BoundedRow ReferenceNorm(NormKind kind, const BoundedRow& x, const float* weight, const float* bias,
                         float eps);

// x * W^T + bias over the matrices one under the other; bias null or of their total n.
BoundedRow ReferenceMatMul(const BoundedRow& x, const std::vector<const QuantizedMatrix*>& stacked,
                           const float* bias);

Bounded ReferenceActivation(Activation act, Bounded x);
Bounded Add(Bounded a, Bounded b);
Bounded Multiply(Bounded a, Bounded b);

// One query over `count` keys and values, each [count][head_dim].
BoundedRow ReferenceAttention(const float* q, const std::vector<const float*>& keys,
                              const std::vector<const float*>& values, int64_t head_dim,
                              float scale);

}  // namespace sluice
