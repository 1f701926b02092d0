// What the last stage makes of its logits: seeds and choices, penalties over the right tokens,
// minimum lengths, prompt scores.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "tests/worker/engine/reference_model.h"
#include "tests/worker/engine/small_model.h"
#include "tests/worker/engine/test_pipeline.h"

namespace sluice::worker {
namespace {

using internal::v1::PromptScores;
using internal::v1::SamplingParams;
using internal::v1::StepHeader;
using internal::v1::TokenFrame;

const std::vector<uint32_t> kPrompt = {3, 1, 4, 15, 9, 26, 5, 35, 8, 9, 7};
constexpr double kLogprobTolerance = 2e-4;  // Twice a logit's: engine_test.cc

class EngineSamplingTest : public testing::Test {
 protected:
  std::vector<uint32_t> Generate(const SamplingParams& sampling, uint32_t count,
                                 uint32_t stages = 1) {
    TestPipeline pipeline(model_, stages);
    TestSequence sequence = MakeSequence(1, kPrompt);
    sequence.sampling = sampling;
    return pipeline.Generate(&sequence, 4, count);
  }

  const SmallModel model_ = MakeLlama(5);
};

TEST_F(EngineSamplingTest, SameSeedSameAnswerAndChoicesDiffer) {
  SamplingParams params = GreedyParams();
  params.set_temperature(1.5f);
  params.set_seed(42);
  const std::vector<uint32_t> first = Generate(params, 24);
  EXPECT_EQ(first, Generate(params, 24));
  EXPECT_EQ(first, Generate(params, 24, /*stages=*/3));
  std::set<std::vector<uint32_t>> answers = {first};
  for (uint32_t choice = 1; choice < 4; ++choice) {
    params.set_choice(choice);
    answers.insert(Generate(params, 24));
  }
  params.set_choice(0);
  params.set_seed(43);
  answers.insert(Generate(params, 24));
  EXPECT_EQ(answers.size(), 5u);
}

TEST_F(EngineSamplingTest, BatchMatesChangeNoAnswer) {
  SamplingParams params = GreedyParams();
  params.set_temperature(1.5f);
  params.set_seed(7);
  const std::vector<uint32_t> expected = Generate(params, 12);

  TestPipeline pipeline(model_, 2);
  TestSequence mine = MakeSequence(1, kPrompt), mate = MakeSequence(2, {9, 8, 7});
  mine.sampling = params;
  mate.sampling = params;
  mate.sampling.set_seed(8);
  pipeline.RunSlice(&mate, 3, /*sample=*/true);
  pipeline.RunSlice(&mine, 11, /*sample=*/true);
  while (mine.num_outputs() < 12) {
    StepHeader header;
    *header.add_sequences() = pipeline.NextSlice(&mate, 1, /*sample=*/true);
    *header.add_sequences() = pipeline.NextSlice(&mine, 1, /*sample=*/true);
    const auto frame = pipeline.Run(header);
    ASSERT_TRUE(frame.ok()) << frame.status();
    mate.tokens.push_back(frame->tokens(0).token_id());
    mine.tokens.push_back(frame->tokens(1).token_id());
  }
  EXPECT_EQ(expected, std::vector<uint32_t>(mine.tokens.begin() + 11, mine.tokens.end()));
}

TEST_F(EngineSamplingTest, ReplayGivesTheSameAnswer) {
  SamplingParams params = GreedyParams();
  params.set_temperature(1.1f);
  params.set_seed(3);
  params.set_repetition_penalty(1.4f);
  params.set_presence_penalty(0.7f);
  params.set_frequency_penalty(0.3f);
  const std::vector<uint32_t> expected = Generate(params, 16);
  // After 6 tokens the worker is lost: prompt and answer so far are fed as one prefill to a new
  // one.
  TestPipeline pipeline(model_, 1);
  TestSequence sequence = MakeSequence(1, kPrompt);
  sequence.sampling = params;
  sequence.tokens.insert(sequence.tokens.end(), expected.begin(), expected.begin() + 6);
  pipeline.RunSlice(&sequence, 17, /*sample=*/true);
  EXPECT_EQ(pipeline.Generate(&sequence, 1, 16), expected);
}

TEST_F(EngineSamplingTest, PresencePenaltyCountsOutputsOnly) {
  SamplingParams params = GreedyParams();
  params.set_presence_penalty(1000);
  // No output may repeat, but one that the prompt holds may come.
  const std::vector<uint32_t> ids = Generate(params, 40);
  EXPECT_EQ(std::set<uint32_t>(ids.begin(), ids.end()).size(), 40u);
  const auto in_prompt = [](uint32_t id) {
    return std::count(kPrompt.begin(), kPrompt.end(), id) > 0;
  };
  EXPECT_TRUE(std::any_of(ids.begin(), ids.end(), in_prompt));
}

TEST_F(EngineSamplingTest, MinTokensBansUntilThen) {
  const std::vector<uint32_t> free = Generate(GreedyParams(), 8);
  SamplingParams params = GreedyParams();
  params.add_banned_until_min(free[0]);
  EXPECT_EQ(Generate(params, 8), free);  // min_tokens is 0
  params.set_min_tokens(3);
  const std::vector<uint32_t> banned = Generate(params, 3);
  for (const uint32_t id : banned) EXPECT_NE(id, free[0]);
  SamplingParams only_first = params;
  only_first.set_min_tokens(1);
  only_first.clear_banned_until_min();
  for (uint32_t id = 0; id < 61; ++id) {
    if (id != 17) only_first.add_banned_until_min(id);
  }
  const std::vector<uint32_t> one = Generate(only_first, 2);
  EXPECT_EQ(one[0], 17u);
}

TEST_F(EngineSamplingTest, LogprobsAreOfTheRawLogits) {
  TestPipeline pipeline(model_, 1);
  TestSequence sequence = MakeSequence(1, kPrompt);
  sequence.sampling.set_num_logprobs(3);
  sequence.sampling.set_temperature(0.3f);
  const TokenFrame frame = pipeline.RunSlice(&sequence, 11, /*sample=*/true);
  const auto expected = ReferenceLogits(model_, kPrompt, 11).back();
  const auto& token = frame.tokens(0);
  EXPECT_NEAR(token.logprob(), ReferenceLogprob(expected, token.token_id()), kLogprobTolerance);
  ASSERT_EQ(token.top_size(), 3);
  std::vector<double> sorted = expected;
  std::sort(sorted.rbegin(), sorted.rend());
  for (int i = 0; i < 3; ++i) {
    EXPECT_NEAR(expected[token.top(i).token_id()], sorted[i], kLogprobTolerance) << i;
    EXPECT_NEAR(token.top(i).logprob(), ReferenceLogprob(expected, token.top(i).token_id()),
                kLogprobTolerance)
        << i;
  }
}

// All scores of the prompt, fed in chunks of these sizes; positions must follow each other.
std::vector<internal::v1::SampledToken> ScorePrompt(const SmallModel& model, uint32_t stages,
                                                    const std::vector<uint32_t>& chunks) {
  TestPipeline pipeline(model, stages);
  TestSequence sequence = MakeSequence(1, kPrompt);
  sequence.sampling.set_num_prompt_logprobs(2);
  std::vector<internal::v1::SampledToken> scores;
  for (const uint32_t chunk : chunks) {
    const bool sample = sequence.pos + chunk == kPrompt.size();
    const TokenFrame frame = pipeline.RunSlice(&sequence, chunk, sample);
    EXPECT_EQ(frame.tokens_size(), sample ? 1 : 0);
    for (const PromptScores& some : frame.prompt_scores()) {
      EXPECT_EQ(some.seq_id(), 1u);
      EXPECT_EQ(some.first_pos(), scores.size() + 1);
      scores.insert(scores.end(), some.tokens().begin(), some.tokens().end());
    }
  }
  const TokenFrame decode = pipeline.RunSlice(&sequence, 1, /*sample=*/true);
  EXPECT_EQ(decode.prompt_scores_size(), 0);
  return scores;
}

TEST_F(EngineSamplingTest, PromptScoresMatchTheReferenceInAnyChunks) {
  for (const SmallModel& model : {model_, MakeOpt350m(5)}) {
    const auto whole = ScorePrompt(model, 1, {11});
    ASSERT_EQ(whole.size(), 10u);
    const auto logits = ReferenceLogits(model, kPrompt, 11);
    for (size_t i = 0; i < whole.size(); ++i) {
      EXPECT_EQ(whole[i].token_id(), kPrompt[i + 1]);
      EXPECT_NEAR(whole[i].logprob(), ReferenceLogprob(logits[i], kPrompt[i + 1]),
                  kLogprobTolerance)
          << i;
      EXPECT_EQ(whole[i].top_size(), 2);
    }
    const std::vector<std::vector<uint32_t>> cuts = {{4, 4, 3}, {1, 9, 1}, {1, 1, 1, 8}};
    for (const auto& chunks : cuts) {
      const auto cut = ScorePrompt(model, 2, chunks);
      ASSERT_EQ(cut.size(), whole.size());
      for (size_t i = 0; i < cut.size(); ++i) {
        EXPECT_EQ(cut[i].SerializeAsString(), whole[i].SerializeAsString()) << i;
      }
    }
  }
}

}  // namespace
}  // namespace sluice::worker
