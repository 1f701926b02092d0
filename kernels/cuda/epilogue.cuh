// The end of a matmul kernel: what happens to the two results that a thread holds of a token, those
// of rows g and g + 8 of a tile.
#pragma once

#include "kernels/cuda/matmul_params.h"
#include "kernels/cuda/numeric.cuh"

namespace sluice {

__device__ __forceinline__ float Activate(Activation act, float x) {
  switch (act) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return x > 0.0f ? x : 0.0f * x;  // NaN stays NaN
    case Activation::kSilu:
      return x / (1.0f + __expf(-x));
    case Activation::kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
  }
  return x;
}

// Where row `row` of q, k and v goes for the token at `slot` of its KV block; value already turned.
template <typename T>
__device__ __forceinline__ void StoreQkvRow(const EpilogueParams& out, int token, int row,
                                            int64_t block, int slot, float value) {
  const QkvTarget& qkv = out.qkv;
  const int head = row / qkv.head_dim;
  const int element = row - head * qkv.head_dim;
  if (head < qkv.num_heads) {
    static_cast<T*>(out.y)[token * out.y_stride + row] = Numeric<T>::FromFloat(value);
    return;
  }
  if (block < 0) return;  // Padding
  const int kv_head = head - qkv.num_heads;
  const bool is_k = kv_head < qkv.num_kv_heads;
  const int index = is_k ? kv_head : kv_head - qkv.num_kv_heads;
  const int64_t at =
      ((block * qkv.num_kv_heads + index) * qkv.block_size + slot) * qkv.head_dim + element;
  static_cast<T*>(is_k ? qkv.k : qkv.v)[at] = Numeric<T>::FromFloat(value);
}

template <typename T>
__device__ __forceinline__ void StoreQkv(const EpilogueParams& out, const RowOrder& order,
                                         int token, int low_row, float low, float high) {
  const QkvTarget& qkv = out.qkv;
  const int position = qkv.positions[token];
  int64_t block = -1;
  int slot = 0;
  if (position >= 0) {
    const int index = position / qkv.block_size;
    slot = position - index * qkv.block_size;
    block = qkv.block_tables[qkv.sequences[token] * qkv.block_table_stride + index];
  }
  const int head = low_row / qkv.head_dim;
  if (qkv.cos != nullptr && head < qkv.num_heads + qkv.num_kv_heads) {
    const int half = order.pair_distance;  // Half a head
    const int64_t at = int64_t{token} * half + (low_row - head * qkv.head_dim);
    const float cosine = qkv.cos[at], sine = qkv.sin[at];
    // The unfused path rounds q and k to T before it turns them; so does this one.
    low = Numeric<T>::ToFloat(Numeric<T>::FromFloat(low));
    high = Numeric<T>::ToFloat(Numeric<T>::FromFloat(high));
    const float turned = low * cosine - high * sine;
    high = high * cosine + low * sine;
    low = turned;
  }
  const int high_row = order.HighRow(low_row);
  if (low_row < order.n) StoreQkvRow<T>(out, token, low_row, block, slot, low);
  if (high_row < order.n) StoreQkvRow<T>(out, token, high_row, block, slot, high);
}

template <typename T>
__device__ __forceinline__ void StoreRow(const EpilogueParams& out, int token, int row,
                                         float value) {
  const int64_t at = token * out.y_stride + row;
  if (out.kind == EpilogueKind::kLogits) {
    static_cast<float*>(out.y)[at] = value;
    return;
  }
  T* y = static_cast<T*>(out.y) + at;
  value = out.kind == EpilogueKind::kResidual ? Numeric<T>::ToFloat(*y) + value
                                              : Activate(out.act, value);
  *y = Numeric<T>::FromFloat(value);
}

// low, high: accumulators of row low_row and of its partner, for row `token` of x.
template <typename T>
__device__ __forceinline__ void Finish(const EpilogueParams& out, const RowOrder& order, int token,
                                       int low_row, float low, float high) {
  const int high_row = order.HighRow(low_row);
  low *= out.scale;
  high *= out.scale;
  if (out.bias != nullptr) {
    if (low_row < order.n) low += out.bias[low_row];
    if (high_row < order.n) high += out.bias[high_row];
  }
  if (out.kind == EpilogueKind::kQkv) {
    StoreQkv<T>(out, order, token, low_row, low, high);
  } else if (out.kind == EpilogueKind::kGateUp) {
    if (low_row < order.n) {
      static_cast<T*>(out.y)[token * out.y_stride + low_row] =
          Numeric<T>::FromFloat(Activate(out.act, low) * high);
    }
  } else {
    if (low_row < order.n) StoreRow<T>(out, token, low_row, low);
    if (high_row < order.n) StoreRow<T>(out, token, high_row, high);
  }
}

}  // namespace sluice
