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
  __device__ __forceinline__ void SetToken(int token) { token_ = token; }

  // Rows of W; low_row may be n or more (nothing is stored then).
  __device__ __forceinline__ void SetRows(int low_row) {
    low_row_ = low_row;
    high_row_ = order_.HighRow(low_row);
    low_bias_ = high_bias_ = 0.0f;
    if (out_.bias != nullptr) {
      if (low_row_ < order_.n) low_bias_ = out_.bias[low_row_];
      if (high_row_ < order_.n) high_bias_ = out_.bias[high_row_];
    }
  }

  // Reads what Store() needs of the token and the rows. Of a residual's row it must come after
  // whatever wrote the row.
  __device__ __forceinline__ void Prefetch() {
    if (out_.kind == EpilogueKind::kResidual) {
      const T* y = static_cast<const T*>(out_.y) + token_ * out_.y_stride;
      if (low_row_ < order_.n) low_before_ = Numeric<T>::ToFloat(y[low_row_]);
      if (high_row_ < order_.n) high_before_ = Numeric<T>::ToFloat(y[high_row_]);
    }
  }

  // low, high: accumulators of the two rows.
  __device__ __forceinline__ void Store(float low, float high) {
    low = low * out_.scale + low_bias_;
    high = high * out_.scale + high_bias_;
    switch (out_.kind) {
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
  const EpilogueParams& out_;
  const RowOrder& order_;
  int token_ = 0, low_row_ = 0, high_row_ = 0;
  float low_bias_ = 0.0f, high_bias_ = 0.0f;
  float low_before_ = 0.0f, high_before_ = 0.0f;  // Residual
};

}  // namespace sluice
