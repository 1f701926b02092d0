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

// One pair of rows of W (g and g + 8 of a tile) and one row of x at a time. What depends on the row of
// x alone, on the pair of rows alone, and what is read of memory for both can each be asked for
// early, so that nothing is waited for when the sums are there.
template <typename T>
class Epilogue {
 public:
  __device__ __forceinline__ Epilogue(const EpilogueParams& out, const RowOrder& order)
      : out_(out), order_(order) {}

  // Row of x.
  __device__ __forceinline__ void SetToken(int token) {
    token_ = token;
    if (out_.kind != EpilogueKind::kQkv) return;
    const QkvTarget& qkv = out_.qkv;
    const int position = qkv.positions[token];
    slot_ = -1;
    if (position < 0) return;  // Padding
    const int index = position / qkv.block_size;
    const int64_t block = qkv.block_tables[qkv.sequences[token] * qkv.block_table_stride + index];
    slot_ = block * qkv.num_kv_heads * qkv.block_size + position - index * qkv.block_size;
  }

  // Rows of W; low_row may be n or more (nothing is stored then).
  __device__ __forceinline__ void SetRows(int low_row) {
    low_row_ = low_row;
    high_row_ = order_.HighRow(low_row);
    low_bias_ = high_bias_ = 0.0f;
    if (out_.bias != nullptr) {
      if (low_row_ < order_.n) low_bias_ = out_.bias[low_row_];
      if (high_row_ < order_.n) high_bias_ = out_.bias[high_row_];
    }
    if (out_.kind != EpilogueKind::kQkv) return;
    head_ = low_row / out_.qkv.head_dim;  // Of both: heads have a multiple of 16 rows
    element_ = low_row - head_ * out_.qkv.head_dim;
  }

  // Reads what Store() needs of the token and the rows. Of a residual's row it must come after
  // whatever wrote the row.
  __device__ __forceinline__ void Prefetch() {
    if (out_.kind == EpilogueKind::kResidual) {
      const T* y = static_cast<const T*>(out_.y) + token_ * out_.y_stride;
      if (low_row_ < order_.n) low_before_ = Numeric<T>::ToFloat(y[low_row_]);
      if (high_row_ < order_.n) high_before_ = Numeric<T>::ToFloat(y[high_row_]);
    } else if (out_.kind == EpilogueKind::kQkv && Turns()) {
      const int64_t at = int64_t{token_} * order_.pair_distance + element_;
      low_before_ = out_.qkv.cos[at];
      high_before_ = out_.qkv.sin[at];
    }
  }

  // low, high: accumulators of the two rows.
  __device__ __forceinline__ void Store(float low, float high) {
    low = low * out_.scale + low_bias_;
    high = high * out_.scale + high_bias_;
    switch (out_.kind) {
      case EpilogueKind::kQkv:
        return StoreQkv(low, high);
      case EpilogueKind::kGateUp:
        if (low_row_ < order_.n) Row()[low_row_] = ToT(Activate(out_.act, low) * high);
        return;
      case EpilogueKind::kLogits: {
        float* y = static_cast<float*>(out_.y) + token_ * out_.y_stride;
        if (low_row_ < order_.n) y[low_row_] = low;
        if (high_row_ < order_.n) y[high_row_] = high;
        return;
      }
      case EpilogueKind::kResidual:
        if (low_row_ < order_.n) Row()[low_row_] = ToT(low_before_ + low);
        if (high_row_ < order_.n) Row()[high_row_] = ToT(high_before_ + high);
        return;
      case EpilogueKind::kStore:
        if (low_row_ < order_.n) Row()[low_row_] = ToT(Activate(out_.act, low));
        if (high_row_ < order_.n) Row()[high_row_] = ToT(Activate(out_.act, high));
        return;
    }
  }

 private:
  static __device__ __forceinline__ T ToT(float x) { return Numeric<T>::FromFloat(x); }
  __device__ __forceinline__ T* Row() const {
    return static_cast<T*>(out_.y) + token_ * out_.y_stride;
  }
  __device__ __forceinline__ bool Turns() const {
    return out_.qkv.cos != nullptr && head_ < out_.qkv.num_heads + out_.qkv.num_kv_heads;
  }

  __device__ __forceinline__ void StoreQkv(float low, float high) const {
    if (low_row_ >= order_.n) return;
    const QkvTarget& qkv = out_.qkv;
    if (Turns()) {
      // The unfused path rounds q and k to T before it turns them; so does this one.
      const float a = Numeric<T>::ToFloat(ToT(low)), b = Numeric<T>::ToFloat(ToT(high));
      low = a * low_before_ - b * high_before_;
      high = b * low_before_ + a * high_before_;
    }
    T* to = Row() + low_row_;
    if (head_ >= qkv.num_heads) {
      if (slot_ < 0) return;
      const int kv_head = head_ - qkv.num_heads;
      const bool is_k = kv_head < qkv.num_kv_heads;
      const int64_t row =
          slot_ + int64_t{is_k ? kv_head : kv_head - qkv.num_kv_heads} * qkv.block_size;
      to = static_cast<T*>(is_k ? qkv.k : qkv.v) + row * qkv.head_dim + element_;
    }
    to[0] = ToT(low);
    if (high_row_ < order_.n) to[high_row_ - low_row_] = ToT(high);
  }

  const EpilogueParams& out_;
  const RowOrder& order_;
  int token_ = 0, low_row_ = 0, high_row_ = 0, head_ = 0, element_ = 0;
  int64_t slot_ = 0;  // Of the token in its KV block, in rows of a head; < 0: none
  float low_bias_ = 0.0f, high_bias_ = 0.0f;
  float low_before_ = 0.0f, high_before_ = 0.0f;  // Residual; or cosine and sine
};

}  // namespace sluice
