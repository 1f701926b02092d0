// Products of activations with packed weights: y = act(x * W^T + bias), or residual += x * W^T +
// bias.
//
// Each output element is one chain of fused multiply-adds over k in the order of the packed
// columns, from 0: the same chain for every number of rows, blocking and thread count, so the same
// bits. With few rows the weights stay in registers; with more, a panel of weights is turned to
// float once and used for all rows.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/thread_pool.h"

namespace sluice {

// Rows of float32: x[m] = data + m * stride.
struct FloatRows {
  const float* data = nullptr;
  int64_t rows = 0;
  int64_t stride = 0;
};

// Where the product goes. add: y += product + bias (act must be kNone); else y = act(product +
// bias).
struct MatMulOutput {
  float* y = nullptr;
  int64_t stride = 0;
  const float* bias = nullptr;  // [N], or null
  Activation act = Activation::kNone;
  bool add = false;
};

// Memory of MatMul, owned by the backend. Sizes do not depend on the step.
class MatMulScratch {
 public:
  static constexpr int64_t kMaxPanelColumns =
      1024;  // k of a panel: with 32 rows of W 128 KiB, within an L2 cache
  static constexpr int64_t kMaxPanelRows = 32;  // Rows of W
  static constexpr int64_t kMaxRows = 480;      // Rows of x whose sums a thread holds at once

  explicit MatMulScratch(int num_threads);
  // Makes room for rows of x in act-order.
  absl::Status ReserveGathered(int64_t max_rows, int64_t max_k);

  float* panel(int thread) { return memory_.as<float>() + thread * kThreadFloats; }
  float* sums(int thread) { return panel(thread) + kMaxPanelColumns * kMaxPanelRows; }
  // REQUIRES: rows and k within ReserveGathered.
  float* gathered(int64_t rows, int64_t stride);

 private:
  static constexpr int64_t kThreadFloats = (kMaxPanelColumns + kMaxRows) * kMaxPanelRows;
  Buffer memory_;
  HostMemory gathered_;
};

// Stride in floats for rows of k floats that are read side by side: a multiple of 4 KiB would put
// them all into the same few lines of the first-level cache.
constexpr int64_t PaddedStride(int64_t k) { return (k + 15) / 16 * 16 + 16; }

// REQUIRES: x has w.k() columns, y [x.rows, w.n()] does not overlap x.
void MatMul(const CpuPackedMatrix& w, const FloatRows& x, const MatMulOutput& out,
            MatMulScratch& scratch, ThreadPool& pool);

// The target that was picked: "AVX3", "AVX2", "SSSE3".
const char* SimdTargetName();

}  // namespace sluice
