// The products of the backend against plain loops in double, for every format, and the contract
// that the number of rows, threads and stacked parts changes no bit.
#include <memory>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend.h"
#include "tests/support/backend_tensors.h"
#include "tests/support/kernel_formats.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference.h"
#include "tests/support/simd_targets.h"

namespace sluice {
namespace {

std::unique_ptr<Backend> NewBackend(int threads) {
  auto backend = MakeCpuBackend(threads);
  SLUICE_CHECK(backend.ok() && (*backend)->Reserve({600, 512, 2100, 8, 64}).ok());
  return *std::move(backend);
}

class MatMulTest : public SimdTargetTest {
 protected:
  std::unique_ptr<Backend> backend_ = NewBackend(2);
};

// Rows [begin, end) of x times the matrix, with a bias.
std::vector<float> Product(Backend& backend, const std::vector<const QuantizedMatrix*>& stacked,
                           const QuantizedMatrix& bias, const std::vector<float>& x, int64_t begin,
                           int64_t end) {
  const auto weight = *backend.Upload(stacked);
  const auto bias_vector = *backend.UploadVector({&bias});
  const int64_t k = weight->k();
  const std::vector<float> rows(x.begin() + begin * k, x.begin() + end * k);
  const TestTensor input(backend, end - begin, k, rows, /*gap=*/5);
  const TestTensor output(backend, end - begin, weight->n(), /*gap=*/3);
  backend.NormMatMul({}, input.view(), {weight.get(), bias_vector.get()}, Activation::kNone,
                     output.view());
  return output.Read();
}

TEST_P(MatMulTest, EveryFormatMatchesTheReference) {
  uint64_t seed = 0;
  for (const WeightFormat& format : AllWeightFormats()) {
    for (const auto& [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {16, 64}, {37, 131}, {80, 96}}) {
      RandomTensors random(++seed);
      const QuantizedMatrix matrix = random.Matrix(format.Spec(n, k));
      const QuantizedMatrix bias = random.Vector(n);
      const int64_t m = 14;
      const std::vector<float> x = random.Normals(m * k);
      const std::vector<float> y = Product(*backend_, {&matrix}, bias, x, 0, m);
      for (int64_t row = 0; row < m; row += 13) {
        const BoundedRow expected = ReferenceMatMul(Exactly(&x[row * k], k), {&matrix},
                                                    reinterpret_cast<const float*>(bias.codes()));
        const std::vector<float> actual(y.begin() + row * n, y.begin() + (row + 1) * n);
        ASSERT_TRUE(WithinBounds(actual, expected))
            << NameOf(format.format) << " " << NameOf(format.dtype) << " group "
            << format.group_size << " " << n << "x" << k << " row " << row;
      }
    }
  }
}

// The contract: each row alone gives the bits that it gives among others.
TEST_P(MatMulTest, RowsDoNotDependOnTheirNumber) {
  uint64_t seed = 100;
  for (const WeightFormat& format : AllWeightFormats()) {
    RandomTensors random(++seed);
    const int64_t n = 75, k = 150, m = 27;
    const QuantizedMatrix matrix = random.Matrix(format.Spec(n, k));
    const QuantizedMatrix bias = random.Vector(n);
    const std::vector<float> x = random.Normals(m * k);
    const std::vector<float> together = Product(*backend_, {&matrix}, bias, x, 0, m);
    for (const auto& [begin, end] :
         {std::pair<int64_t, int64_t>{0, 1}, {26, 27}, {3, 5}, {4, 7}, {1, 5}, {2, 14}}) {
      const std::vector<float> part(together.begin() + begin * n, together.begin() + end * n);
      ASSERT_TRUE(SameBits(Product(*backend_, {&matrix}, bias, x, begin, end), part))
          << NameOf(format.format) << " group " << format.group_size << " rows " << begin << ".."
          << end;
    }
  }
}

TEST_P(MatMulTest, ThreadsChangeNoBit) {
  uint64_t seed = 200;
  for (const WeightFormat& format : AllWeightFormats()) {
    RandomTensors random(++seed);
    const QuantizedMatrix matrix = random.Matrix(format.Spec(200, 96));
    const QuantizedMatrix bias = random.Vector(200);
    const std::vector<float> x = random.Normals(100 * 96);
    for (const int64_t m : {1, 2, 100}) {
      const std::vector<float> one = Product(*NewBackend(1), {&matrix}, bias, x, 0, m);
      ASSERT_TRUE(SameBits(Product(*backend_, {&matrix}, bias, x, 0, m), one)) << m;
      ASSERT_TRUE(SameBits(Product(*NewBackend(3), {&matrix}, bias, x, 0, m), one)) << m;
    }
  }
}

// More columns than a panel holds, rows than the sums of a piece, and strides that fall on one
// cache set.
TEST_P(MatMulTest, LargeSizesAreCutWithoutChangingABit) {
  uint64_t seed = 300;
  for (const int64_t group_size : {0, 32, 40, 1500}) {
    for (const int64_t k : {2048, 2100}) {
      RandomTensors random(++seed);
      const QuantizedMatrix matrix = random.Matrix(
          WeightFormat{QuantFormat::kInt4Zero, DType::kF16, group_size, false}.Spec(48, k));
      const QuantizedMatrix bias = random.Vector(48);
      const int64_t m = 500;
      const std::vector<float> x = random.Normals(m * k);
      const auto weight = *backend_->Upload({&matrix});
      const TestTensor input(*backend_, m, k, x);
      const TestTensor output(*backend_, m, 48);
      backend_->NormMatMul({}, input.view(), {weight.get(), nullptr}, Activation::kNone,
                           output.view());
      const std::vector<float> y = output.Read();
      for (const int64_t row : {int64_t{0}, int64_t{250}, m - 1}) {
        const TestTensor one(*backend_, 1, 48);
        backend_->NormMatMul({}, input.view().Rows(row, 1), {weight.get(), nullptr},
                             Activation::kNone, one.view());
        const std::vector<float> actual(y.begin() + row * 48, y.begin() + (row + 1) * 48);
        ASSERT_TRUE(SameBits(actual, one.Read())) << k << " group " << group_size;
        ASSERT_TRUE(
            WithinBounds(actual, ReferenceMatMul(Exactly(&x[row * k], k), {&matrix}, nullptr)))
            << k;
      }
    }
  }
}

TEST_P(MatMulTest, StackedPartsKeepTheirFormatsAndPerms) {
  RandomTensors random(7);
  const int64_t k = 100;
  const QuantizedMatrix a =
      random.Matrix(WeightFormat{QuantFormat::kInt4Zero, DType::kF16, 32, true}.Spec(19, k));
  QuantizedMatrix b =
      random.Matrix(WeightFormat{QuantFormat::kInt4Zero, DType::kF16, 32, true}.Spec(33, k));
  std::memcpy(b.perm(), a.perm(), k * sizeof(int32_t));  // Shared, as q, k and v of one layer may
  const QuantizedMatrix c =
      random.Matrix(WeightFormat{QuantFormat::kTable4, DType::kF32, 64, true}.Spec(7, k));
  const QuantizedMatrix d =
      random.Matrix(WeightFormat{QuantFormat::kInt8, DType::kF16, 0, false}.Spec(40, k));
  const QuantizedMatrix bias = random.Vector(19 + 33 + 7 + 40);
  for (const int64_t m : {1, 9}) {
    const std::vector<float> x = random.Normals(m * k);
    const std::vector<float> y = Product(*backend_, {&a, &b, &c, &d}, bias, x, 0, m);
    const BoundedRow expected = ReferenceMatMul(Exactly(x.data(), k), {&a, &b, &c, &d},
                                                reinterpret_cast<const float*>(bias.codes()));
    EXPECT_TRUE(WithinBounds({y.begin(), y.begin() + 99}, expected)) << m;
  }
}

TEST_P(MatMulTest, NormActivationAndResidual) {
  RandomTensors random(8);
  const int64_t n = 50, k = 77;
  const QuantizedMatrix matrix =
      random.Matrix(WeightFormat{QuantFormat::kInt4Offset, DType::kF16, 32}.Spec(n, k));
  const QuantizedMatrix weight_source = random.Vector(k, 1.0f);
  const auto weight = *backend_->Upload({&matrix});
  const auto norm_weight = *backend_->UploadVector({&weight_source});
  for (const int64_t m : {1, 8}) {
    for (const Activation act : {Activation::kNone, Activation::kRelu, Activation::kSilu,
                                 Activation::kGelu, Activation::kGeluTanh}) {
      const std::vector<float> x = random.Normals(m * k, 3.0f);
      const TestTensor input(*backend_, m, k, x), output(*backend_, m, n);
      backend_->NormMatMul({NormKind::kRms, norm_weight.get(), nullptr, 1e-5f}, input.view(),
                           {weight.get(), nullptr}, act, output.view());
      BoundedRow expected = ReferenceMatMul(
          ReferenceNorm(NormKind::kRms, Exactly(x.data(), k), norm_weight->data(), nullptr, 1e-5f),
          {&matrix}, nullptr);
      for (Bounded& element : expected) element = ReferenceActivation(act, element);
      const std::vector<float> y = output.Read();
      EXPECT_TRUE(WithinBounds({y.begin(), y.begin() + n}, expected)) << static_cast<int>(act);
    }
    const std::vector<float> x = random.Normals(m * k), old = random.Normals(m * n);
    const TestTensor input(*backend_, m, k, x), residual(*backend_, m, n, old);
    backend_->MatMulResidual(input.view(), {weight.get(), nullptr}, residual.view());
    BoundedRow expected = ReferenceMatMul(Exactly(x.data(), k), {&matrix}, nullptr);
    for (int64_t i = 0; i < n; ++i) expected[i] = Add(expected[i], {old[i], 0});
    const std::vector<float> y = residual.Read();
    EXPECT_TRUE(WithinBounds({y.begin(), y.begin() + n}, expected));
  }
}

TEST_P(MatMulTest, GateAndUp) {
  RandomTensors random(9);
  const int64_t k = 64;
  for (const int64_t half : {16, 37, 96}) {
    const WeightFormat format = {QuantFormat::kInt4Offset, DType::kF16, 32};
    const QuantizedMatrix gate = random.Matrix(format.Spec(half, k)),
                          up = random.Matrix(format.Spec(half, k));
    const auto weight = *backend_->Upload({&gate, &up});
    std::vector<float> first_row;
    for (const int64_t m : {1, 2, 40}) {
      RandomTensors inputs(10);
      const std::vector<float> x = inputs.Normals(m * k, 2.0f);
      const TestTensor input(*backend_, m, k, x), output(*backend_, m, half);
      backend_->NormGateUp({}, input.view(), {weight.get(), nullptr}, Activation::kSilu,
                           output.view());
      const BoundedRow both = ReferenceMatMul(Exactly(x.data(), k), {&gate, &up}, nullptr);
      BoundedRow expected;
      for (int64_t i = 0; i < half; ++i) {
        expected.push_back(
            Multiply(ReferenceActivation(Activation::kSilu, both[i]), both[half + i]));
      }
      std::vector<float> y = output.Read();
      y.resize(half);
      EXPECT_TRUE(WithinBounds(y, expected)) << m << " " << half;
      if (first_row.empty()) first_row = y;
      EXPECT_TRUE(SameBits(y, first_row)) << m << " " << half;
    }
  }
}

TEST_P(MatMulTest, LmHeadTakesTheRowsAskedFor) {
  RandomTensors random(11);
  const int64_t n = 130, k = 48, m = 9;
  const QuantizedMatrix head =
      random.Matrix(WeightFormat{QuantFormat::kInt8, DType::kF16, 32}.Spec(n, k));
  const QuantizedMatrix norm_source = random.Vector(k, 1.0f);
  const auto weight = *backend_->Upload({&head});
  const auto norm_weight = *backend_->UploadVector({&norm_source});
  const std::vector<float> x = random.Normals(m * k);
  const TestTensor input(*backend_, m, k, x), logits(*backend_, 2, n);
  backend_->LmHead({NormKind::kRms, norm_weight.get(), nullptr, 1e-5f}, input.view(), {7, 2},
                   {weight.get(), nullptr}, logits.view());
  const std::vector<float> y = logits.Read();
  for (int64_t i = 0; i < 2; ++i) {
    const BoundedRow normalized = ReferenceNorm(
        NormKind::kRms, Exactly(&x[(i == 0 ? 7 : 2) * k], k), norm_weight->data(), nullptr, 1e-5f);
    EXPECT_TRUE(WithinBounds({y.begin() + i * n, y.begin() + (i + 1) * n},
                             ReferenceMatMul(normalized, {&head}, nullptr)));
  }
}

TEST_P(MatMulTest, EmbedGivesTheDequantizedRow) {
  RandomTensors random(12);
  const QuantizedMatrix table =
      random.Matrix(WeightFormat{QuantFormat::kInt8, DType::kF16, 32}.Spec(40, 70));
  const auto packed = *backend_->Upload({&table});
  const std::vector<uint32_t> ids = {39, 0, 17, 17};
  const TestTensor output(*backend_, 4, 70);
  backend_->Embed(*packed, ids, output.view());
  std::vector<float> expected(4 * 70);
  for (int i = 0; i < 4; ++i) DequantizeRow(table, ids[i], &expected[i * 70]);
  EXPECT_TRUE(SameBits(output.Read(), expected));
  backend_->AddEmbedding(*packed, ids, output.view());
  for (float& value : expected) value += value;
  EXPECT_TRUE(SameBits(output.Read(), expected));
}

INSTANTIATE_TEST_SUITE_P(Targets, MatMulTest, testing::ValuesIn(SimdTargets()), SimdTargetLabel);

TEST(CpuBackendTest, NamesItsTargetAndThreads) {
  EXPECT_THAT((*MakeCpuBackend(2))->Name(),
              testing::MatchesRegex("cpu \\((avx3|avx2|ssse3), 2 threads\\)"));
  EXPECT_EQ(MakeCpuBackend(0).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(MakeCpuBackend(1025).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(CpuBackendTest, MemoryThatIsNotThereIsAStatus) {
  const auto backend = *MakeCpuBackend(1);
  EXPECT_EQ(backend->Allocate(int64_t{1} << 60).status().code(),
            absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace sluice
