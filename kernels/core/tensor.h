// TensorView: a pointer to a row-major matrix of activations, never its owner.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/core/dtype.h"

namespace sluice {

// [rows, cols], `stride` elements from one row to the next (stride >= cols). The memory belongs to
// the backend that the view is used with: host memory for CPU, device memory for CUDA.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;

  // Columns [begin, begin + count) of the same rows.
  TensorView Columns(int64_t begin, int64_t count) const {
    TensorView view = *this;
    view.data = static_cast<uint8_t*>(data) + begin * static_cast<int64_t>(SizeOf(dtype));
    view.cols = count;
    return view;
  }
  // Rows [begin, begin + count).
  TensorView Rows(int64_t begin, int64_t count) const {
    TensorView view = *this;
    view.data = static_cast<uint8_t*>(data) + begin * stride * static_cast<int64_t>(SizeOf(dtype));
    view.rows = count;
    return view;
  }
  // Row `row` as float; REQUIRES: dtype == kF32 and host memory.
  float* Row(int64_t row) const { return static_cast<float*>(data) + row * stride; }
};

}  // namespace sluice
