// Activation functions on vectors, for one SIMD target at a time (Highway): included within
// foreach_target.
#if defined(SLUICE_KERNELS_CPU_ACTIVATION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_KERNELS_CPU_ACTIVATION_INL_H_
#undef SLUICE_KERNELS_CPU_ACTIVATION_INL_H_
#else
#define SLUICE_KERNELS_CPU_ACTIVATION_INL_H_
#endif

#include <cmath>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/backend.h"

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// 1 / (1 + e^-x). The clamp keeps e^-x in the range of Exp; beyond it the result is 0 to float's
// last bit anyway.
template <class D, class V>
HWY_INLINE V Sigmoid(D d, V x) {
  const V exponent = hn::Min(hn::Neg(x), hn::Set(d, 88.0f));
  const V one = hn::Set(d, 1.0f);
  return hn::Div(one, hn::Add(one, hn::Exp(d, exponent)));
}

// x/2 * (1 + erf(x / sqrt 2)), by the C library: there is no vector erf, and few models use it.
template <class D, class V>
HWY_INLINE V GeluErf(D d, V x) {
  HWY_ALIGN float lanes[hn::MaxLanes(d)];
  hn::Store(x, d, lanes);
  for (float& lane : lanes) lane = 0.5f * lane * (1.0f + std::erf(lane * 0.70710678f));
  return hn::Load(d, lanes);
}

// x/2 * (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2/pi) * (x + 0.044715 x^3).
template <class D, class V>
HWY_INLINE V GeluTanh(D d, V x) {
  const V cubic = hn::Mul(hn::Mul(x, x), hn::Set(d, 0.044715f));
  const V inner = hn::Mul(hn::MulAdd(cubic, x, x), hn::Set(d, 2.0f * 0.79788456f));
  return hn::Mul(x, Sigmoid(d, inner));
}

template <class D, class V>
HWY_INLINE V Activate(D d, Activation act, V x) {
  switch (act) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return hn::Max(x, hn::Zero(d));
    case Activation::kSilu:
      return hn::Mul(x, Sigmoid(d, x));
    case Activation::kGelu:
      return GeluErf(d, x);
    case Activation::kGeluTanh:
      return GeluTanh(d, x);
  }
  return x;
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();
#endif
