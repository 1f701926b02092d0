// Tensors of a backend for kernel tests: poisoned with NaN, so that an element nobody wrote is
// seen.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/backend.h"
#include "kernels/core/check.h"
#include "tests/support/reference.h"

namespace sluice {

// [rows, cols] float32 in memory of the backend, with `gap` NaN elements between rows.
class TestTensor {
 public:
  TestTensor(Backend& backend, int64_t rows, int64_t cols, int64_t gap = 0)
      : backend_(backend), view_{nullptr, DType::kF32, rows, cols, cols + gap} {
    absl::StatusOr<std::unique_ptr<DeviceBuffer>> buffer =
        backend.Allocate(rows * view_.stride * 4);
    SLUICE_CHECK(buffer.ok()) << buffer.status();
    buffer_ = *std::move(buffer);
    view_.data = buffer_->data();
    const TensorView everything = {view_.data, DType::kF32, 1, rows * view_.stride,
                                   rows * view_.stride};
    const std::vector<float> poison(rows * view_.stride, std::numeric_limits<float>::quiet_NaN());
    backend.CopyFromHost(poison.data(), everything);
  }
  TestTensor(Backend& backend, int64_t rows, int64_t cols, const std::vector<float>& values,
             int64_t gap = 0)
      : TestTensor(backend, rows, cols, gap) {
    backend.CopyFromHost(values.data(), view_);
  }

  TensorView view() const { return view_; }
  std::vector<float> Read() const {
    std::vector<float> values(view_.rows * view_.cols);
    backend_.CopyToHost(view_, values.data());
    return values;
  }

 private:
  Backend& backend_;
  TensorView view_;
  std::unique_ptr<DeviceBuffer> buffer_;
};

// Each element within its bound; names the worst one.
inline testing::AssertionResult WithinBounds(const std::vector<float>& actual,
                                             const BoundedRow& expected) {
  if (actual.size() != expected.size()) {
    return testing::AssertionFailure()
           << actual.size() << " elements where " << expected.size() << " are due";
  }
  double worst = 1.0;
  size_t at = actual.size();
  for (size_t i = 0; i < actual.size(); ++i) {
    const double error = std::abs(static_cast<double>(actual[i]) - expected[i].value);
    const double ratio = error == 0 ? 0 : error / expected[i].bound;
    if (!(ratio <= worst)) {  // True for NaN
      worst = ratio;
      at = i;
    }
  }
  if (at == actual.size()) return testing::AssertionSuccess();
  return testing::AssertionFailure()
         << "element " << at << " is " << actual[at] << ", expected " << expected[at].value
         << " +- " << expected[at].bound << " (" << worst << " times the bound)";
}

// Equal bit by bit, which NaN is not to anything.
inline testing::AssertionResult SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size())
    return testing::AssertionFailure() << a.size() << " and " << b.size() << " elements";
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(a[i] == b[i]) || std::signbit(a[i]) != std::signbit(b[i])) {
      return testing::AssertionFailure() << "element " << i << ": " << a[i] << " and " << b[i];
    }
  }
  return testing::AssertionSuccess();
}

}  // namespace sluice
