// What the matmul kernels are told: plain data, passed by value. y = epilogue(norm(x) * W^T).
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cuda/packed_layout.h"
#include "kernels/cuda/step_inputs.h"

namespace sluice {

// What becomes of a result before it is written.
enum class EpilogueKind : uint8_t {
  kStore,     // y[m][row] = act(v)
  kResidual,  // y[m][row] += v
  kGateUp,    // y[m][row] = act(v of row) * (v of row + pair_distance); rows of the first half
  kLogits,    // y[m][row] = v, float32
};

struct EpilogueParams {
  EpilogueKind kind = EpilogueKind::kStore;
  Activation act = Activation::kNone;
  const float* bias = nullptr;  // [n] or null
  float scale = 1.0f;           // Of the accumulator, before the bias: a power of two
  void* y = nullptr;
  int64_t y_stride = 0;
};

// Rows of x as the kernel takes them.
struct InputParams {
  const void* x = nullptr;  // [rows, k] of the activation dtype
  int64_t stride = 0;
  int32_t rows = 0;
  const int32_t* row_index = nullptr;  // Row m is x[row_index[m]]; null: in order
  const int32_t* perm = nullptr;  // Column i is column perm[i] of x (act-order); null: in order
  NormKind norm = NormKind::kNone;
  const float* norm_weight = nullptr;
  const float* norm_bias = nullptr;
  float eps = 0.0f;
};

struct WeightParams {
  const void* data = nullptr;  // Records, or rows of a plain matrix
  RowOrder order;
  int32_t k = 0;
  int32_t tiles = 0;
  int32_t records = 0;            // Of a tile
  int32_t record_bytes = 0;       // Quantized
  int32_t steps_per_granule = 0;  // Power of two; quantized
  int64_t plain_stride = 0;       // Elements; plain
  float table[16] = {};           // table4
};

struct MatMulParams {
  InputParams in;
  WeightParams w;
  EpilogueParams out;
};

}  // namespace sluice
