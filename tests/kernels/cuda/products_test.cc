// The products of the CUDA backend against double arithmetic on the dequantized weights: every
// format, both dtypes, row counts on each side of every way a product takes (fused, batched,
// unpacked), shapes with remainders. Bounds: weight, normed input and result are each rounded to the
// activations' dtype (unit u = 2^-11 or 2^-8), sums are float32.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/backend.h"
#include "tests/support/random_tensor.h"

namespace sluice {
namespace {

struct Case {
  QuantFormat format = QuantFormat::kPlain;
  DType dtype = DType::kF16;  // Of activations and scales
  int64_t group_size = 0;     // 0: the whole row
  bool has_perm = false;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    cases.push_back({QuantFormat::kPlain, dtype});
    for (const QuantFormat format : {QuantFormat::kInt4Zero, QuantFormat::kInt4Offset,
                                     QuantFormat::kTable4, QuantFormat::kInt8}) {
      for (const int64_t group : {0, 32, 64, 128}) cases.push_back({format, dtype, group});
    }
    cases.push_back({QuantFormat::kInt4Zero, dtype, 128, /*has_perm=*/true});
    cases.push_back({QuantFormat::kInt4Zero, dtype, 20});  // Kept plain
  }
  return cases;
}

std::string Label(const testing::TestParamInfo<Case>& info) {
  const Case& c = info.param;
  return absl::StrCat(NameOf(c.format), "_", NameOf(c.dtype), "_g", c.group_size,
                      c.has_perm ? "_perm" : "");
}

float Rounded(DType dtype, float x) {
  return dtype == DType::kF16 ? HalfToFloat(FloatToHalf(x)) : BFloat16ToFloat(FloatToBFloat16(x));
}

struct Value {
  double value = 0, magnitude = 0;  // Sum of terms, sum of their absolute values
};

class ProductsTest : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no GPU";
    auto backend = MakeCudaBackend(0, GetParam().dtype);
    ASSERT_TRUE(backend.ok()) << backend.status();
    backend_ = *std::move(backend);
    unit_ = GetParam().dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
  }

  void Begin(int64_t rows, int64_t n, int64_t k) {
    ASSERT_TRUE(backend_
                    ->Reserve({.max_rows = rows,
                               .max_n = n,
                               .max_k = k,
                               .step_rows = rows,
                               .max_sequences = rows})
                    .ok());
    backend_->BeginStep({.num_rows = rows});
  }

  QuantSpec Spec(int64_t n, int64_t k) const {
    const Case& c = GetParam();
    QuantSpec spec;
    spec.format = c.format;
    spec.n = n;
    spec.k = k;
    if (c.format == QuantFormat::kPlain) {
      spec.plain_dtype = c.dtype;
    } else {
      spec.scale_dtype = c.dtype;
      spec.group_size = c.group_size == 0 ? k : std::min(c.group_size, k);
      spec.has_perm = c.has_perm;
    }
    return spec;
  }

  // Values rounded to the dtype, so that the reference sees what the device sees.
  std::vector<float> Values(int64_t count, float deviation = 1.0f) {
    std::vector<float> values = random_.Normals(count, deviation);
    for (float& value : values) value = Rounded(GetParam().dtype, value);
    return values;
  }

  struct Tensor {
    std::unique_ptr<DeviceBuffer> buffer;
    TensorView view;
  };
  // Poisoned with NaN where nothing is written.
  Tensor Upload(int64_t rows, int64_t cols, const std::vector<float>* values, DType dtype) {
    Tensor tensor;
    const int64_t bytes = rows * cols * static_cast<int64_t>(SizeOf(dtype));
    auto buffer = backend_->Allocate(bytes);
    EXPECT_TRUE(buffer.ok()) << buffer.status();
    tensor.buffer = *std::move(buffer);
    tensor.view = {tensor.buffer->data(), dtype, rows, cols, cols};
    if (dtype == DType::kF32) {
      const std::vector<float> nan(rows * cols, std::numeric_limits<float>::quiet_NaN());
      backend_->CopyFromHost(nan.data(), tensor.view);
      return tensor;
    }
    std::vector<uint16_t> bits(rows * cols, 0x7fff);
    for (size_t i = 0; values != nullptr && i < bits.size(); ++i) {
      bits[i] = dtype == DType::kF16 ? FloatToHalf((*values)[i]) : FloatToBFloat16((*values)[i]);
    }
    backend_->CopyFromHost(bits.data(), tensor.view);
    return tensor;
  }
  std::vector<float> Read(const Tensor& tensor) {
    const auto count = static_cast<size_t>(tensor.view.rows * tensor.view.cols);
    std::vector<float> values(count);
    if (tensor.view.dtype == DType::kF32) {
      backend_->CopyToHost(tensor.view, values.data());
      return values;
    }
    std::vector<uint16_t> bits(count);
    backend_->CopyToHost(tensor.view, bits.data());
    ToFloat(tensor.view.dtype, bits.data(), count, values.data());
    return values;
  }

  // x * W^T + bias for every row, W stacked.
  std::vector<Value> Reference(const std::vector<double>& x, int64_t rows,
                               const std::vector<QuantizedMatrix>& stacked,
                               const std::vector<float>& bias) {
    const int64_t k = stacked[0].spec.k;
    std::vector<Value> out;
    std::vector<std::vector<float>> weights;
    for (const QuantizedMatrix& matrix : stacked) {
      for (int64_t row = 0; row < matrix.spec.n; ++row) {
        weights.emplace_back(k);
        DequantizeRow(matrix, row, weights.back().data());
      }
    }
    for (int64_t m = 0; m < rows; ++m) {
      for (size_t n = 0; n < weights.size(); ++n) {
        Value sum = {bias[n], std::abs(static_cast<double>(bias[n]))};
        for (int64_t i = 0; i < k; ++i) {
          const double term = static_cast<double>(weights[n][i]) * x[m * k + i];
          sum.value += term;
          sum.magnitude += std::abs(term);
        }
        out.push_back(sum);
      }
    }
    return out;
  }

  // `roundings`: of values that enter `value` with the weight of `magnitude`.
  void ExpectNear(const std::vector<float>& actual, const std::vector<Value>& expected,
                  double roundings, const std::string& what) {
    ASSERT_EQ(actual.size(), expected.size());
    double worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < actual.size(); ++i) {
      const double bound =
          unit_ * (roundings * expected[i].magnitude + 1e-3) + 0x1p-18 * expected[i].magnitude;
      const double ratio = std::abs(actual[i] - expected[i].value) / bound;
      if (!(ratio <= worst)) worst = ratio, at = i;
    }
    EXPECT_LE(worst, 1.0) << what << ": element " << at << " of " << actual.size() << " is "
                          << actual[at] << ", expected " << expected[at].value << ", magnitude "
                          << expected[at].magnitude;
  }

  std::unique_ptr<PackedMatrix> Pack(const std::vector<QuantizedMatrix>& stacked,
                                     int64_t pair_distance = 0) {
    std::vector<const QuantizedMatrix*> pointers;
    for (const QuantizedMatrix& matrix : stacked) pointers.push_back(&matrix);
    auto packed = backend_->UploadPaired(pointers, pair_distance);
    EXPECT_TRUE(packed.ok()) << packed.status();
    return *std::move(packed);
  }
  std::unique_ptr<DeviceVector> UploadFloats(const std::vector<float>& values) {
    QuantizedMatrix vector = PlainMatrix(1, static_cast<int64_t>(values.size()), values);
    const QuantizedMatrix* pointer = &vector;
    auto uploaded = backend_->UploadVector(absl::MakeConstSpan(&pointer, 1));
    EXPECT_TRUE(uploaded.ok()) << uploaded.status();
    return *std::move(uploaded);
  }

  std::unique_ptr<Backend> backend_;
  RandomTensors random_{7};
  double unit_ = 0;
};

std::vector<double> ToDouble(const std::vector<float>& x) { return {x.begin(), x.end()}; }

TEST_P(ProductsTest, NormMatMulAtEveryRowCount) {
  for (const auto [n, k] : {std::pair<int64_t, int64_t>{48, 256}, {200, 576}, {37, 160}}) {
    std::vector<QuantizedMatrix> w;
    w.push_back(random_.Matrix(Spec(n, k)));
    const auto packed = Pack(w);
    const std::vector<float> bias_values = random_.Normals(n);
    const auto bias = UploadFloats(bias_values);
    for (const int64_t rows : {1, 2, 5, 8, 9, 16, 17, 33, 64, 65, 128, 129, 200}) {
      Begin(rows, n, k);
      const std::vector<float> x = Values(rows * k);
      const Tensor in = Upload(rows, k, &x, GetParam().dtype);
      const Tensor out = Upload(rows, n, nullptr, GetParam().dtype);
      backend_->NormMatMul(Norm(), in.view, {packed.get(), bias.get()}, Activation::kRelu,
                           out.view);
      std::vector<Value> expected = Reference(ToDouble(x), rows, w, bias_values);
      for (Value& v : expected) v.value = std::max(v.value, 0.0);
      ExpectNear(Read(out), expected, 3, absl::StrCat(rows, " rows, n ", n, ", k ", k));
    }
  }
}

TEST_P(ProductsTest, NormIsAppliedFirst) {
  constexpr int64_t kN = 64, kK = 288;
  std::vector<QuantizedMatrix> w;
  w.push_back(random_.Matrix(Spec(kN, kK)));
  const auto packed = Pack(w);
  const std::vector<float> gamma = random_.Normals(kK), beta = random_.Normals(kK);
  const auto weight = UploadFloats(gamma), shift = UploadFloats(beta);
  const std::vector<float> zero(kN, 0.0f);
  for (const NormKind kind : {NormKind::kRms, NormKind::kLayer}) {
    for (const int64_t rows : {1, 7, 20, 150}) {
      Begin(rows, kN, kK);
      const std::vector<float> x = Values(rows * kK, 3.0f);
      std::vector<double> normed;
      for (int64_t m = 0; m < rows; ++m) {
        double mean = 0, square = 0;
        for (int64_t i = 0; i < kK; ++i) mean += x[m * kK + i] / double{kK};
        if (kind == NormKind::kRms) mean = 0;
        for (int64_t i = 0; i < kK; ++i) square += std::pow(x[m * kK + i] - mean, 2) / double{kK};
        for (int64_t i = 0; i < kK; ++i) {
          const double y = (x[m * kK + i] - mean) / std::sqrt(square + 1e-5) * gamma[i];
          normed.push_back(kind == NormKind::kLayer ? y + beta[i] : y);
        }
      }
      const Tensor in = Upload(rows, kK, &x, GetParam().dtype);
      const Tensor out = Upload(rows, kN, nullptr, GetParam().dtype);
      const Norm norm = {kind, weight.get(), kind == NormKind::kLayer ? shift.get() : nullptr,
                         1e-5f};
      backend_->NormMatMul(norm, in.view, {packed.get(), nullptr}, Activation::kNone, out.view);
      ExpectNear(Read(out), Reference(normed, rows, w, zero), 6,
                 absl::StrCat(rows, " rows, norm ", static_cast<int>(kind)));
    }
  }
}

TEST_P(ProductsTest, GateUpJoinsTheHalves) {
  constexpr int64_t kK = 256;
  for (const int64_t inner : {64, 136, 50}) {  // 50: no pairs
    std::vector<QuantizedMatrix> w;
    w.push_back(random_.Matrix(Spec(inner, kK)));
    w.push_back(random_.Matrix(Spec(inner, kK)));
    if (w[0].perm() != nullptr && w[0].spec.has_perm) {
      std::copy_n(w[0].perm(), kK, w[1].perm());
    }
    const auto packed = Pack(w, inner);
    const std::vector<float> bias_values = random_.Normals(2 * inner);
    const auto bias = UploadFloats(bias_values);
    for (const int64_t rows : {1, 8, 12, 64, 100, 140}) {
      Begin(rows, 2 * inner, kK);
      const std::vector<float> x = Values(rows * kK);
      const Tensor in = Upload(rows, kK, &x, GetParam().dtype);
      const Tensor out = Upload(rows, inner, nullptr, GetParam().dtype);
      backend_->NormGateUp(Norm(), in.view, {packed.get(), bias.get()}, Activation::kRelu,
                           out.view);
      const std::vector<Value> wide = Reference(ToDouble(x), rows, w, bias_values);
      std::vector<Value> expected;
      for (int64_t m = 0; m < rows; ++m) {
        for (int64_t i = 0; i < inner; ++i) {
          const Value &gate = wide[m * 2 * inner + i], &up = wide[m * 2 * inner + inner + i];
          expected.push_back({std::max(gate.value, 0.0) * up.value, gate.magnitude * up.magnitude});
        }
      }
      ExpectNear(Read(out), expected, 8, absl::StrCat(rows, " rows, inner ", inner));
    }
  }
}

TEST_P(ProductsTest, ResidualIsAddedOnce) {
  constexpr int64_t kN = 160, kK = 1056;
  std::vector<QuantizedMatrix> w;
  w.push_back(random_.Matrix(Spec(kN, kK)));
  const auto packed = Pack(w);
  const std::vector<float> bias_values = random_.Normals(kN);
  const auto bias = UploadFloats(bias_values);
  for (const bool with_bias : {false, true}) {
    for (const int64_t rows : {1, 8, 40, 64, 129}) {
      Begin(rows, kN, kK);
      const std::vector<float> x = Values(rows * kK), before = Values(rows * kN, 4.0f);
      const Tensor in = Upload(rows, kK, &x, GetParam().dtype);
      const Tensor out = Upload(rows, kN, &before, GetParam().dtype);
      backend_->MatMulResidual(in.view, {packed.get(), with_bias ? bias.get() : nullptr}, out.view);
      const std::vector<float> zero(kN, 0.0f);
      std::vector<Value> expected = Reference(ToDouble(x), rows, w, with_bias ? bias_values : zero);
      for (size_t i = 0; i < expected.size(); ++i) {
        expected[i].value += before[i];
        expected[i].magnitude += std::abs(before[i]);
      }
      ExpectNear(Read(out), expected, 3, absl::StrCat(rows, " rows"));
    }
  }
}

// A stack whose parts differ is computed part by part.
TEST_P(ProductsTest, PartsMayDiffer) {
  constexpr int64_t kK = 256, kRows = 3;
  std::vector<QuantizedMatrix> w;
  w.push_back(random_.Matrix(Spec(40, kK)));
  QuantSpec plain;
  plain.plain_dtype = GetParam().dtype;
  plain.n = 24;
  plain.k = kK;
  w.push_back(random_.Matrix(plain));
  w.push_back(random_.Matrix(Spec(16, kK)));
  const auto packed = Pack(w);
  const std::vector<float> bias_values = random_.Normals(80);
  const auto bias = UploadFloats(bias_values);
  for (const int64_t rows : {kRows, int64_t{30}, int64_t{150}}) {
    Begin(rows, 80, kK);
    const std::vector<float> x = Values(rows * kK);
    const Tensor in = Upload(rows, kK, &x, GetParam().dtype);
    const Tensor out = Upload(rows, 80, nullptr, GetParam().dtype);
    backend_->NormMatMul(Norm(), in.view, {packed.get(), bias.get()}, Activation::kNone, out.view);
    ExpectNear(Read(out), Reference(ToDouble(x), rows, w, bias_values), 3,
               absl::StrCat(rows, " rows"));
  }
}

TEST_P(ProductsTest, HeadTakesTheChosenRows) {
  constexpr int64_t kN = 333, kK = 192, kRows = 30;
  std::vector<QuantizedMatrix> w;
  w.push_back(random_.Matrix(Spec(kN, kK)));
  const auto packed = Pack(w);
  const std::vector<float> x = Values(kRows * kK), zero(kN, 0.0f);
  const Tensor in = Upload(kRows, kK, &x, GetParam().dtype);
  for (const std::vector<int64_t>& rows :
       {std::vector<int64_t>{29}, {3, 3, 17}, {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20}}) {
    Begin(kRows, kN, kK);
    std::vector<double> chosen;
    for (const int64_t row : rows) {
      chosen.insert(chosen.end(), x.begin() + row * kK, x.begin() + (row + 1) * kK);
    }
    const auto count = static_cast<int64_t>(rows.size());
    const Tensor out = Upload(count, kN, nullptr, DType::kF32);
    backend_->LmHead(Norm(), in.view, rows, {packed.get(), nullptr}, out.view);
    ExpectNear(Read(out), Reference(chosen, count, w, zero), 2, absl::StrCat(count, " rows"));
  }
}

TEST_P(ProductsTest, EmbeddingRows) {
  if (GetParam().has_perm) return;  // No embedding has a permutation
  constexpr int64_t kN = 100, kK = 200, kRows = 5;
  QuantizedMatrix w = random_.Matrix(Spec(kN, kK));
  std::vector<QuantizedMatrix> stack;
  stack.push_back(std::move(w));
  const auto packed = Pack(stack);
  const std::vector<uint32_t> ids = {99, 0, 7, 8, 50};
  ASSERT_TRUE(backend_
                  ->Reserve({.max_rows = kRows,
                             .max_n = kN,
                             .max_k = kK,
                             .step_rows = kRows,
                             .max_sequences = kRows})
                  .ok());
  backend_->BeginStep({.num_rows = kRows, .token_ids = ids, .table_rows = ids});
  const Tensor out = Upload(kRows, kK, nullptr, GetParam().dtype);
  backend_->Embed(*packed, ids, out.view);
  std::vector<Value> once, twice;
  std::vector<float> row(kK);
  for (const uint32_t id : ids) {
    DequantizeRow(stack[0], id, row.data());
    for (const float value : row) {
      once.push_back({value, std::abs(value)});
      twice.push_back({2.0 * value, std::abs(2.0 * value)});
    }
  }
  ExpectNear(Read(out), once, 2, "embedding");
  backend_->AddEmbedding(*packed, ids, out.view);
  ExpectNear(Read(out), twice, 3, "added");
}

INSTANTIATE_TEST_SUITE_P(Formats, ProductsTest, testing::ValuesIn(Cases()), Label);

}  // namespace
}  // namespace sluice
