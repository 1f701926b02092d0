// The numbers of the engine: against a float64 reference, and that cutting prompts, batches and
// models changes no bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "tests/worker/engine/reference_model.h"
#include "tests/worker/engine/small_model.h"
#include "tests/worker/engine/test_pipeline.h"

namespace sluice::worker {
namespace {

using internal::v1::StepHeader;

// float32 against float64. A logit is a sum of about 100 products of size <= 3 behind 3 layers of
// such sums, each with a relative error of about 100 * 2^-24 = 6e-6 at worst: 3 * 2 * 6e-6 * 3 =
// 1e-4.
constexpr double kLogitTolerance = 1e-4;
constexpr uint32_t kPromptLen = 23;

struct ModelCase {
  const char* name;
  SmallModel (*make)(uint32_t seed);
};

std::vector<uint32_t> RandomIds(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<uint32_t> ids(count);
  for (uint32_t& id : ids) id = random() % 61;
  return ids;
}

// Logits of every position of `ids`, fed in chunks of these sizes.
std::vector<float> LogitsInChunks(TestPipeline* pipeline, TestSequence sequence,
                                  const std::vector<uint32_t>& chunks) {
  std::vector<float> logits;
  for (const uint32_t chunk : chunks) {
    pipeline->RunSlice(&sequence, chunk, /*sample=*/false);
    const std::vector<float> rows = pipeline->last().LogitsForTest();
    logits.insert(logits.end(), rows.begin(), rows.end());
  }
  StepHeader release;
  release.add_released_seq_ids(sequence.seq_id);
  EXPECT_TRUE(pipeline->Run(release).ok());
  pipeline->FreeBlocks(&sequence);
  return logits;
}

void ExpectClose(const std::vector<std::vector<double>>& expected,
                 const std::vector<float>& actual) {
  const size_t vocab = expected[0].size();
  ASSERT_EQ(actual.size(), expected.size() * vocab);
  double worst = 0;
  size_t where = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double error = std::abs(actual[i] - expected[i / vocab][i % vocab]);
    if (!(error <= worst)) worst = error, where = i;
  }
  EXPECT_LE(worst, kLogitTolerance) << "position " << where / vocab << ", id " << where % vocab;
}

class EngineTest : public testing::TestWithParam<ModelCase> {
 protected:
  SmallModel model_ = GetParam().make(7);
};

TEST_P(EngineTest, LogitsMatchTheReference) {
  TestPipeline pipeline(model_, 1);
  const TestSequence sequence = MakeSequence(1, RandomIds(kPromptLen, 1));
  ExpectClose(ReferenceLogits(model_, sequence.tokens, kPromptLen),
              LogitsInChunks(&pipeline, sequence, {kPromptLen}));
}

TEST_P(EngineTest, DecodedLogitsMatchTheReference) {
  TestPipeline pipeline(model_, 2);
  TestSequence sequence = MakeSequence(1, RandomIds(5, 2));
  std::vector<float> logits;
  pipeline.RunSlice(&sequence, 5, /*sample=*/true);
  logits = pipeline.last().LogitsForTest();
  while (sequence.num_outputs() < 30) {
    pipeline.RunSlice(&sequence, 1, /*sample=*/true);
    const std::vector<float> row = pipeline.last().LogitsForTest();
    logits.insert(logits.end(), row.begin(), row.end());
  }
  std::vector<uint32_t> inputs = sequence.tokens;
  inputs.pop_back();
  const auto expected = ReferenceLogits(model_, inputs, 5);
  ExpectClose(expected, logits);
  for (size_t pos = 4; pos < inputs.size(); ++pos) {
    // The sampled id is the reference's best, or as good within the tolerance.
    const double best = *std::max_element(expected[pos].begin(), expected[pos].end());
    EXPECT_GE(expected[pos][sequence.tokens[pos + 1]], best - 2 * kLogitTolerance) << pos;
  }
}

TEST_P(EngineTest, ChunksChangeNoBit) {
  TestPipeline pipeline(model_, 1);
  const TestSequence sequence = MakeSequence(1, RandomIds(kPromptLen, 3));
  TestSequence second = sequence, third = sequence;
  second.seq_id = 2;
  third.seq_id = 3;
  const std::vector<float> whole = LogitsInChunks(&pipeline, sequence, {kPromptLen});
  EXPECT_EQ(whole, LogitsInChunks(&pipeline, second, {7, 1, 10, 5}));
  EXPECT_EQ(whole, LogitsInChunks(&pipeline, third, std::vector<uint32_t>(kPromptLen, 1)));
}

TEST_P(EngineTest, StagesChangeNoBit) {
  const TestSequence sequence = MakeSequence(1, RandomIds(kPromptLen, 4));
  TestPipeline one(model_, 1);
  const std::vector<float> expected = LogitsInChunks(&one, sequence, {kPromptLen});
  for (const uint32_t stages : {2u, 3u}) {
    TestPipeline cut(model_, stages);
    EXPECT_EQ(expected, LogitsInChunks(&cut, sequence, {kPromptLen})) << stages;
  }
}

TEST_P(EngineTest, BatchMatesChangeNoBit) {
  TestPipeline alone(model_, 1), together(model_, 1);
  const TestSequence mine = MakeSequence(1, RandomIds(9, 5));
  const std::vector<float> expected = LogitsInChunks(&alone, mine, {9});

  TestSequence sequence = mine;
  TestSequence before = MakeSequence(2, RandomIds(12, 6));
  TestSequence after = MakeSequence(3, RandomIds(8, 7));
  together.RunSlice(&before, 11, /*sample=*/false);
  StepHeader header;
  *header.add_sequences() = together.NextSlice(&before, 1, /*sample=*/true);
  *header.add_sequences() = together.NextSlice(&sequence, 9, /*sample=*/false);
  *header.add_sequences() = together.NextSlice(&after, 8, /*sample=*/true);
  ASSERT_TRUE(together.Run(header).ok());
  const std::vector<float> logits = together.last().LogitsForTest();
  const size_t vocab = model_.config.vocab_size();
  ASSERT_EQ(logits.size(), 18 * vocab);
  const auto begin = logits.begin() + static_cast<int64_t>(vocab);
  EXPECT_EQ(expected, std::vector<float>(begin, begin + static_cast<int64_t>(expected.size())));
}

TEST_P(EngineTest, RunningAheadGivesTheSameIds) {
  for (const uint32_t stages : {1u, 2u, 3u}) {
    TestPipeline explicit_ids(model_, stages), ahead(model_, stages);
    TestSequence sequence = MakeSequence(1, RandomIds(6, 8));
    sequence.sampling.set_temperature(0.9f);
    sequence.sampling.set_seed(11);
    sequence.sampling.set_repetition_penalty(1.3f);
    sequence.sampling.set_frequency_penalty(0.4f);
    TestSequence other = sequence;
    const std::vector<uint32_t> expected = explicit_ids.Generate(&sequence, 6, 20);

    std::vector<uint32_t> ids;
    uint64_t sampled_by = 0;
    for (int i = 0; i < 20; ++i) {
      StepHeader header;
      *header.add_sequences() =
          ahead.NextSlice(&other, i == 0 ? 6 : 1, /*sample=*/true, sampled_by);
      const auto frame = ahead.Run(header);
      ASSERT_TRUE(frame.ok()) << frame.status();
      sampled_by = frame->step();
      ids.push_back(frame->tokens(0).token_id());
    }
    EXPECT_EQ(expected, ids) << stages << " stages";
  }
}

INSTANTIATE_TEST_SUITE_P(Models, EngineTest,
                         testing::Values(ModelCase{"Llama", MakeLlama},
                                         ModelCase{"TiedDynamicLlama", MakeTiedDynamicLlama},
                                         ModelCase{"Opt", MakeOpt},
                                         ModelCase{"Opt350m", MakeOpt350m}),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace sluice::worker
