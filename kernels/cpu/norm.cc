#include <cmath>

#include "kernels/core/check.h"
#include "kernels/cpu/ops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/norm.cc"
#include "hwy/foreach_target.h"  // Must come before highway.h
// clang-format off
#include "hwy/highway.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;

// Sum of f(x[i]): lane j takes every Lanes-th element, then the lanes, then the rest one by one.
template <class VectorFunction>
HWY_INLINE float Sum(const float* x, int64_t count, const VectorFunction& f) {
  const DF df;
  const hn::CappedTag<float, 1> d1;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  auto sum = hn::Zero(df);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) sum = hn::Add(sum, f(df, hn::LoadU(df, x + i)));
  float total = hn::GetLane(hn::SumOfLanes(df, sum));
  for (; i < count; ++i) total += hn::GetLane(f(d1, hn::LoadU(d1, x + i)));
  return total;
}

// y = (x - mean) * inverse * weight + bias, each optional but inverse. The rest beyond whole
// vectors goes lane by lane with the same roundings.
HWY_INLINE void Apply(const Norm& norm, const float* x, int64_t count, float mean, float inverse,
                      float* y) {
  const float* weight = norm.weight == nullptr ? nullptr : norm.weight->data();
  const float* bias = norm.bias == nullptr ? nullptr : norm.bias->data();
  const auto piece = [&](auto d, int64_t i) {
    auto value = hn::Mul(hn::Sub(hn::LoadU(d, x + i), hn::Set(d, mean)), hn::Set(d, inverse));
    if (weight != nullptr) value = hn::Mul(value, hn::LoadU(d, weight + i));
    if (bias != nullptr) value = hn::Add(value, hn::LoadU(d, bias + i));
    hn::StoreU(value, d, y + i);
  };
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) piece(df, i);
  for (; i < count; ++i) piece(hn::CappedTag<float, 1>(), i);
}

void NormRow(const Norm& norm, const float* x, int64_t count, float* y) {
  const float size = static_cast<float>(count);
  float mean = 0.0f;
  if (norm.kind == NormKind::kLayer) mean = Sum(x, count, [](auto, auto v) { return v; }) / size;
  const float squares = Sum(x, count, [mean](auto d, auto v) {
    const auto centred = hn::Sub(v, hn::Set(d, mean));
    return hn::Mul(centred, centred);
  });
  Apply(norm, x, count, mean, 1.0f / std::sqrt(squares / size + norm.eps), y);
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice {

HWY_EXPORT(NormRow);

void NormRows(const Norm& norm, TensorView x, absl::Span<const int64_t> rows, TensorView y,
              ThreadPool& pool) {
  SLUICE_CHECK(norm.weight == nullptr || norm.weight->size() == x.cols) << norm.weight->size();
  SLUICE_CHECK(norm.bias == nullptr || norm.bias->size() == x.cols) << norm.bias->size();
  const int64_t rows_per_piece = std::max<int64_t>(1, kFloatsPerPiece / x.cols);
  const auto function = HWY_DYNAMIC_DISPATCH(NormRow);
  pool.ParallelFor((y.rows + rows_per_piece - 1) / rows_per_piece, [&](int64_t piece, int) {
    const int64_t end = std::min(y.rows, (piece + 1) * rows_per_piece);
    for (int64_t m = piece * rows_per_piece; m < end; ++m) {
      const float* from = x.Row(rows.empty() ? m : rows[m]);
      if (norm.kind == NormKind::kNone) {
        std::copy_n(from, x.cols, y.Row(m));
      } else {
        function(norm, from, x.cols, y.Row(m));
      }
    }
  });
}

}  // namespace sluice
#endif  // HWY_ONCE
