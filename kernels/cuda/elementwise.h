// The kernels of a step that are neither products nor attention: norm and gather of rows,
// embedding, activation, bias and residual, rotary table.
//
// All work on rows of activations of `dtype` (kF16 or kBF16) in device memory, compute in float32
// and round once. They are bound by the bytes they move: 16 bytes a load where pointers and strides
// are multiples of 16 bytes and cols is one of 8, one element a load otherwise. Strides are in
// elements. Asynchronous on context.stream, recordable in a graph; threads: any, one at a time a
// stream.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/core/dtype.h"
#include "kernels/cuda/step_inputs.h"

namespace sluice {

struct LaunchContext;

// y[m] = norm(x[row_index[m]]) for m < rows. y may be x only when row_index and perm are null.
struct NormRowsArgs {
  NormKind kind = NormKind::kNone;  // kNone: copies (a gather)
  const float* weight = nullptr;    // [cols], or null
  const float* bias = nullptr;      // [cols], or null; kLayer only
  float eps = 0.0f;
  const void* x = nullptr;
  int64_t x_stride = 0;
  const int32_t* row_index = nullptr;  // [rows], or null: row m
  // [cols], or null: column i of y is column perm[i] of norm(x) (the order of an act-order weight).
  const int32_t* perm = nullptr;
  void* y = nullptr;
  int64_t y_stride = 0;
  int64_t rows = 0;
  int64_t cols = 0;
  DType dtype = DType::kF16;
};
void NormRows(const LaunchContext& context, const NormRowsArgs& args);

// A table of embeddings, plain.
struct EmbeddingTable {
  const void* data = nullptr;  // [rows, cols]
  DType dtype = DType::kF16;   // kF16, kBF16 or kF32
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;
};
// Dense rows of activations [step.rows, cols].
struct ActivationRows {
  void* data = nullptr;
  int64_t stride = 0;
  DType dtype = DType::kF16;
};
// out[m] = row step.token_ids[m] of table. An id beyond the table reads row 0: the host checks ids
// before a step.
void EmbedRows(const LaunchContext& context, const DeviceStep& step, const EmbeddingTable& table,
               const ActivationRows& out);
// x[m] += row step.table_rows[m] of table (learned positions).
void AddEmbeddingRows(const LaunchContext& context, const DeviceStep& step,
                      const EmbeddingTable& table, const ActivationRows& x);

// y[m][i] = act(wide[m][i]) * wide[m][cols + i], for i < cols: wide is gate stacked on up.
struct GateUpArgs {
  const void* wide = nullptr;  // [rows, 2 * cols]
  int64_t wide_stride = 0;
  Activation act = Activation::kNone;
  void* y = nullptr;  // [rows, cols]
  int64_t y_stride = 0;
  int64_t rows = 0;
  int64_t cols = 0;
  DType dtype = DType::kF16;
};
void GateUp(const LaunchContext& context, const GateUpArgs& args);

// y = act(x + bias), or y += act(x + bias): what follows a product that has no epilogue of its own.
// y may be x when x_dtype is dtype.
struct BiasActivationArgs {
  const void* x = nullptr;      // [rows, cols]
  DType x_dtype = DType::kF16;  // dtype, or kF32
  int64_t x_stride = 0;
  const float* bias = nullptr;  // [cols], or null
  Activation act = Activation::kNone;
  bool accumulate = false;  // y +=
  void* y = nullptr;        // [rows, cols]
  int64_t y_stride = 0;
  int64_t rows = 0;
  int64_t cols = 0;
  DType dtype = DType::kF16;
};
void AddBiasActivation(const LaunchContext& context, const BiasActivationArgs& args);

// cos, sin [rows, half_dim] of positions[m] * inv_freq[m * inv_freq_row_stride + i], times scale;
// 1 and 0 for kPaddingPosition. The product is rounded to float, its sine and cosine are taken in
// double and rounded: the CPU's bits but for a last place now and then.
struct RopeTableArgs {
  const int32_t* positions = nullptr;  // [rows]
  const float* inv_freq = nullptr;
  int64_t inv_freq_row_stride = 0;  // 0: the same half_dim floats for all rows
  int64_t half_dim = 0;
  float scale = 1.0f;
  int64_t rows = 0;
  float* cos = nullptr;
  float* sin = nullptr;
};
void RopeTable(const LaunchContext& context, const RopeTableArgs& args);

}  // namespace sluice
