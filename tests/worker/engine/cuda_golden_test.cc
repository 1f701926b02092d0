// The golden checkpoints on a GPU: the same files, answers and engine as golden_test, with float16 and
// bfloat16 activations.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <tuple>

#include "kernels/backend.h"
#include "services/checkpoint/checkpoint.h"
#include "tests/worker/engine/golden.h"

namespace sluice::worker {
namespace {

using checkpoint::Checkpoint;

// Smallest head that the GPU has attention for; some checkpoints have smaller ones.
constexpr uint32_t kSmallestHead = 32;
// Bounds of |logit - golden| where the logits' spread is about 2.5: some tens of roundings of
// activations to a unit of 2^-11 or 2^-8 on the way through two layers.
constexpr float kFloat16Bound = 0.04f;
constexpr float kBFloat16Bound = 0.3f;

class CudaGoldenTest : public testing::TestWithParam<std::tuple<std::string, DType>> {};

TEST_P(CudaGoldenTest, LogitsAndGreedyIds) {
  const auto& [name, dtype] = GetParam();
  if (!MakeCudaBackend(0, dtype).ok()) GTEST_SKIP() << "no GPU";
  const auto folder = CheckpointFolder() / name;
  auto source = Checkpoint::Open(folder.string());
  ASSERT_TRUE(source.ok()) << source.status();
  const auto& config = (*source)->description().config();
  if (config.head_dim() < kSmallestHead) return;
  const Golden golden = ReadGolden(folder);
  const auto make_backend = [dtype = dtype](size_t) {
    auto backend = MakeCudaBackend(0, dtype);
    EXPECT_TRUE(backend.ok()) << backend.status();
    return *std::move(backend);
  };
  const float bound = dtype == DType::kF16 ? kFloat16Bound : kBFloat16Bound;
  const Outcome run =
      RunGolden(**source, golden, /*stages=*/1, /*chunk=*/40, WeightForm::kAsStored, make_backend);
  float worst = 0;
  for (size_t i = 0; i < golden.logits.size(); ++i) {
    const size_t vocab = config.vocab_size();
    const float actual = run.logits.at(golden.positions[i / vocab])[i % vocab];
    const float error = std::abs(actual - golden.logits[i]);
    if (!(error <= worst)) worst = error;
  }
  EXPECT_LE(worst, bound);
  RecordProperty("worst_logit_error", std::to_string(worst));
  ASSERT_EQ(run.sampled.size(), golden.greedy_ids.size());
  for (size_t i = 0; i < run.sampled.size(); ++i) {
    if (golden.gaps[i] <= 2 * bound) continue;  // The bound can change it
    EXPECT_EQ(run.sampled[i], golden.greedy_ids[i]) << "greedy id " << i;
  }
}

std::string TestName(const testing::TestParamInfo<std::tuple<std::string, DType>>& info) {
  std::string name = std::get<0>(info.param) + "_" + NameOf(std::get<1>(info.param));
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Checkpoints, CudaGoldenTest,
                         testing::Combine(testing::ValuesIn(CheckpointNames()),
                                          testing::Values(DType::kF16, DType::kBF16)),
                         TestName);

}  // namespace
}  // namespace sluice::worker
