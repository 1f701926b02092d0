#include <algorithm>

#include "kernels/cpu/ops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/activation.cc"
#include "hwy/foreach_target.h"  // Must come before highway.h
// clang-format off
#include "hwy/highway.h"
#include "kernels/cpu/activation-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {

void GateUpPiece(const float* gate, const float* up, Activation act, int64_t count, float* y) {
  const hn::ScalableTag<float> df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto activated = Activate(df, act, hn::LoadU(df, gate + i));
    hn::StoreU(hn::Mul(activated, hn::LoadU(df, up + i)), df, y + i);
  }
  const hn::CappedTag<float, 1> d1;
  for (; i < count; ++i) {
    const auto activated = Activate(d1, act, hn::LoadU(d1, gate + i));
    hn::StoreU(hn::Mul(activated, hn::LoadU(d1, up + i)), d1, y + i);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice {

HWY_EXPORT(GateUpPiece);

void GateUp(TensorView gate_up, Activation act, TensorView y, ThreadPool& pool) {
  const int64_t rows_per_piece = std::max<int64_t>(1, kFloatsPerPiece / y.cols);
  const auto function = HWY_DYNAMIC_DISPATCH(GateUpPiece);
  pool.ParallelFor((y.rows + rows_per_piece - 1) / rows_per_piece, [&](int64_t piece, int) {
    const int64_t end = std::min(y.rows, (piece + 1) * rows_per_piece);
    for (int64_t m = piece * rows_per_piece; m < end; ++m) {
      const float* gate = gate_up.Row(m);
      function(gate, gate + y.cols, act, y.cols, y.Row(m));
    }
  });
}

}  // namespace sluice
#endif  // HWY_ONCE
