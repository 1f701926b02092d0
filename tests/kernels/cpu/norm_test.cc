#include "gtest/gtest.h"
#include "kernels/backend.h"
#include "tests/support/backend_tensors.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference.h"
#include "tests/support/simd_targets.h"

namespace sluice {
namespace {

class NormTest : public SimdTargetTest {};

TEST_P(NormTest, MatchesTheReferenceAtEverySize) {
  const auto backend = *MakeCpuBackend(2);
  for (const int64_t k : {1, 7, 16, 33, 576, 4096}) {
    RandomTensors random(static_cast<uint64_t>(k));
    const QuantizedMatrix weight_source = random.Vector(k, 1.0f), bias_source = random.Vector(k);
    const auto weight = *backend->UploadVector({&weight_source});
    const auto bias = *backend->UploadVector({&bias_source});
    std::vector<float> x = random.Normals(3 * k, 4.0f);
    for (float& value : x) value += 1.5f;  // A mean to take away
    for (const NormKind kind : {NormKind::kNone, NormKind::kRms, NormKind::kLayer}) {
      for (const bool with_weights : {true, false}) {
        const DeviceVector* w = with_weights && kind != NormKind::kNone ? weight.get() : nullptr;
        const DeviceVector* b = with_weights && kind == NormKind::kLayer ? bias.get() : nullptr;
        const TestTensor tensor(*backend, 3, k, x, /*gap=*/2);
        backend->ApplyNorm({kind, w, b, 1e-5f}, tensor.view());
        const std::vector<float> y = tensor.Read();
        for (int64_t m = 0; m < 3; ++m) {
          const BoundedRow expected =
              ReferenceNorm(kind, Exactly(&x[m * k], k), w == nullptr ? nullptr : w->data(),
                            b == nullptr ? nullptr : b->data(), 1e-5f);
          EXPECT_TRUE(WithinBounds({y.begin() + m * k, y.begin() + (m + 1) * k}, expected))
              << k << " kind " << static_cast<int>(kind);
        }
      }
    }
  }
}

TEST_P(NormTest, RowsDoNotDependOnTheirNumberOrThreads) {
  const int64_t m = 200, k = 577;
  RandomTensors random(5);
  const std::vector<float> x = random.Normals(m * k);
  std::vector<float> expected;
  for (const int threads : {1, 2, 3}) {
    const auto backend = *MakeCpuBackend(threads);
    const TestTensor all(*backend, m, k, x), single(*backend, m, k, x);
    backend->ApplyNorm({NormKind::kLayer, nullptr, nullptr, 1e-5f}, all.view());
    for (int64_t i = 0; i < m; ++i) {
      backend->ApplyNorm({NormKind::kLayer, nullptr, nullptr, 1e-5f}, single.view().Rows(i, 1));
    }
    EXPECT_TRUE(SameBits(all.Read(), single.Read()));
    if (expected.empty()) expected = all.Read();
    EXPECT_TRUE(SameBits(all.Read(), expected));
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, NormTest, testing::ValuesIn(SimdTargets()), SimdTargetLabel);

TEST(UploadVectorTest, StacksAndRefuses) {
  const auto backend = *MakeCpuBackend(1);
  RandomTensors random(1);
  const QuantizedMatrix a = random.Vector(3), b = random.Vector(2);
  const auto vector = backend->UploadVector({&a, &b});
  ASSERT_TRUE(vector.ok());
  ASSERT_EQ((*vector)->size(), 5);
  EXPECT_EQ((*vector)->data()[2], reinterpret_cast<const float*>(a.codes())[2]);
  EXPECT_EQ((*vector)->data()[3], reinterpret_cast<const float*>(b.codes())[0]);
  const QuantizedMatrix two_rows = PlainMatrix(2, 1, {1, 2});
  EXPECT_EQ(backend->UploadVector({&two_rows}).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace sluice
