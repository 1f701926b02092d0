#include "kernels/cpu/sampling.h"

#include <cmath>
#include <limits>
#include <map>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend.h"
#include "tests/support/backend_tensors.h"
#include "tests/support/random_tensor.h"

namespace sluice {
namespace {

using testing::ElementsAre;

SampledToken Sample(const std::vector<float>& logits, const SamplingRow& row) {
  SamplingScratch scratch;
  scratch.Reserve(static_cast<int64_t>(logits.size()));
  return SampleRow(logits, row, scratch);
}

// Ids that come up in 4000 draws, with their shares.
std::map<uint32_t, double> Shares(const std::vector<float>& logits, SamplingRow row) {
  constexpr int kDraws = 4000;
  std::map<uint32_t, double> shares;
  for (int i = 0; i < kDraws; ++i) {
    row.token_index = static_cast<uint32_t>(i);
    shares[Sample(logits, row).token_id] += 1.0 / kDraws;
  }
  return shares;
}

std::vector<uint32_t> IdsOf(const std::map<uint32_t, double>& shares) {
  std::vector<uint32_t> ids;
  for (const auto& [id, share] : shares) ids.push_back(id);
  return ids;
}

// The known answers of Random123's kat_vectors.
TEST(PhiloxTest, KnownAnswers) {
  EXPECT_THAT(Philox4x32({0, 0, 0, 0}, {0, 0}),
              ElementsAre(0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u));
  EXPECT_THAT(Philox4x32({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}),
              ElementsAre(0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu));
  EXPECT_THAT(
      Philox4x32({0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}, {0xa4093822u, 0x299f31d0u}),
      ElementsAre(0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u));
}

TEST(UniformDrawTest, IsTheHighBitsOfTheFirstTwoWords) {
  const auto words = Philox4x32({7, 2, 0, 0}, {0x9abcdef0u, 0x12345678u});
  const uint64_t bits = (static_cast<uint64_t>(words[0]) << 32 | words[1]) >> 11;
  EXPECT_EQ(UniformDraw(0x123456789abcdef0u, 2, 7), std::ldexp(static_cast<double>(bits), -53));
}

TEST(SampleTest, TemperatureZeroIsTheLowestOfTheHighest) {
  EXPECT_EQ(Sample({1, 5, 2, 5, 5}, {}).token_id, 1u);
  std::vector<float> logits = RandomTensors(1).Normals(1003);
  logits[1001] = logits[17] = 9.0f;
  EXPECT_EQ(Sample(logits, {}).token_id, 17u);
  logits[1002] = 10.0f;
  EXPECT_EQ(Sample(logits, {}).token_id, 1002u);
}

TEST(SampleTest, SharesAreTheProbabilities) {
  const std::vector<float> logits = {std::log(0.1f), std::log(0.6f), std::log(0.3f)};
  SamplingRow row;
  row.temperature = 1.0f;
  row.seed = 11;
  auto shares = Shares(logits, row);
  // Four standard deviations of a share of 4000 draws.
  const auto near = [](double p) {
    return testing::DoubleNear(p, 4 * std::sqrt(p * (1 - p) / 4000));
  };
  EXPECT_THAT(shares[0], near(0.1));
  EXPECT_THAT(shares[1], near(0.6));
  EXPECT_THAT(shares[2], near(0.3));
  row.temperature = 0.5f;  // Squares the probabilities
  shares = Shares(logits, row);
  EXPECT_THAT(shares[1], near(0.36 / 0.46));
}

TEST(SampleTest, IsAFunctionOfSeedChoiceAndIndex) {
  const std::vector<float> logits = RandomTensors(2).Normals(5000);
  SamplingRow row;
  row.temperature = 1.0f;
  row.seed = 3;
  const uint32_t first = Sample(logits, row).token_id;
  EXPECT_EQ(Sample(logits, row).token_id, first);
  int different = 0;
  for (uint32_t i = 1; i <= 8; ++i) {
    SamplingRow other = row;
    other.token_index = i;
    different += Sample(logits, other).token_id != first;
    other = row;
    other.choice = i;
    different += Sample(logits, other).token_id != first;
    other = row;
    other.seed = (uint64_t{i} << 32) + 3;
    different += Sample(logits, other).token_id != first;
  }
  EXPECT_GE(different, 23);  // One of 24 may hit the same of 5000 by chance
}

TEST(SampleTest, TopKKeepsTheHighestTiesToTheLowestId) {
  SamplingRow row;
  row.temperature = 10.0f;
  row.top_k = 2;
  EXPECT_THAT(IdsOf(Shares({1, 3, 2, 2, 0}, row)), ElementsAre(1, 2));
  row.top_k = 99;
  EXPECT_THAT(IdsOf(Shares({1, 3, 2, 2, 0}, row)), ElementsAre(0, 1, 2, 3, 4));
  row.top_k = 1;
  EXPECT_THAT(IdsOf(Shares({1, 3, 3}, row)), ElementsAre(1));
}

TEST(SampleTest, TopPKeepsTheTokenThatReachesIt) {
  const std::vector<float> logits = {std::log(0.2f), std::log(0.5f), std::log(0.25f),
                                     std::log(0.05f)};
  SamplingRow row;
  row.temperature = 1.0f;
  row.top_p = 0.45f;
  EXPECT_THAT(IdsOf(Shares(logits, row)), ElementsAre(1));
  row.top_p = 0.6f;
  EXPECT_THAT(IdsOf(Shares(logits, row)), ElementsAre(1, 2));
  row.top_p = 0.9f;
  EXPECT_THAT(IdsOf(Shares(logits, row)), ElementsAre(0, 1, 2));
  row.top_k = 2;  // The mass is that of the two: 0.5 / 0.75 reaches 0.66, not 0.7
  row.top_p = 0.66f;
  EXPECT_THAT(IdsOf(Shares(logits, row)), ElementsAre(1));
  row.top_p = 0.7f;
  EXPECT_THAT(IdsOf(Shares(logits, row)), ElementsAre(1, 2));
}

TEST(SampleTest, TopPLooksBeyondItsFirstCandidates) {
  std::vector<float> logits(
      3000, 0.0f);  // Flat: 0.5 is reached at 1500 tokens, those with the lowest ids
  SamplingRow row;
  row.temperature = 1.0f;
  row.top_p = 0.5f;
  for (const auto& [id, share] : Shares(logits, row)) EXPECT_LT(id, 1500u);
}

TEST(SampleTest, MinPIsRelativeToTheHighest) {
  const std::vector<float> logits = {std::log(0.2f), std::log(0.5f), std::log(0.25f),
                                     std::log(0.05f)};
  SamplingRow row;
  row.temperature = 1.0f;
  row.min_p = 0.45f;
  EXPECT_THAT(IdsOf(Shares(logits, row)), ElementsAre(1, 2));
  row.min_p = 1.0f;
  EXPECT_THAT(IdsOf(Shares(logits, row)), ElementsAre(1));
}

TEST(SampleTest, PenaltiesCountEachIdOnce) {
  const std::vector<uint32_t> prompt = {0, 0, 1}, output = {1, 2, 2};
  SamplingRow row;
  row.prompt_ids = prompt;
  row.output_ids = output;
  row.repetition_penalty = 2.0f;
  // After repetition: 4, 2, -2, 2.5.
  EXPECT_EQ(Sample({8, 4, -1, 2.5f}, row).token_id, 0u);
  EXPECT_EQ(Sample({4, 4, -1, 2.5f}, row).token_id, 3u);
  row.repetition_penalty = 1.0f;
  row.presence_penalty = 1.0f;  // Outputs only: 5, 5.5, 5.5
  EXPECT_EQ(Sample({5, 6.5f, 6.5f}, row).token_id, 1u);
  row.frequency_penalty = 0.25f;  // 6.5 - 1 - 0.25 and 6.5 - 1 - 0.5
  EXPECT_EQ(Sample({5.3f, 6.5f, 6.5f}, row).token_id, 0u);
  EXPECT_EQ(Sample({5.1f, 6.5f, 6.5f}, row).token_id, 1u);
  EXPECT_EQ(Sample({5.1f, 6.3f, 6.5f}, row).token_id, 0u);
}

TEST(SampleTest, PenaltiesLeaveNothingBehind) {
  SamplingScratch scratch;
  const std::vector<uint32_t> output = {1, 1};
  SamplingRow penalized;
  penalized.output_ids = output;
  penalized.frequency_penalty = 3.0f;
  EXPECT_EQ(SampleRow(std::vector<float>{1, 5}, penalized, scratch).token_id, 0u);
  SamplingRow other = penalized;
  const std::vector<uint32_t> once = {1};
  other.output_ids = once;
  EXPECT_EQ(SampleRow(std::vector<float>{1, 5}, other, scratch).token_id, 1u);
}

TEST(SampleTest, BannedIdsNeverComeUp) {
  const std::vector<uint32_t> banned = {1, 77};
  SamplingRow row;
  row.banned_ids = banned;
  EXPECT_EQ(Sample({1, 5, 2}, row).token_id, 2u);
  row.temperature = 100.0f;
  EXPECT_THAT(IdsOf(Shares({1, 5, 2}, row)), ElementsAre(0, 2));
}

TEST(SampleTest, ValuesThatAreNotFiniteAreReported) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), inf, -inf}) {
    std::vector<float> logits(40, 0.0f);
    logits[39] = bad;
    EXPECT_FALSE(Sample(logits, {}).finite);
  }
  EXPECT_TRUE(Sample({3e38f, -3e38f}, {}).finite);
}

TEST(SampleTest, LogprobsAreOfTheRawLogits) {
  const std::vector<float> logits = {std::log(0.2f), std::log(0.5f), std::log(0.2f),
                                     std::log(0.1f)};
  const std::vector<uint32_t> banned = {1};
  SamplingRow row;
  row.banned_ids = banned;
  row.num_logprobs = 2;
  const SampledToken token = Sample(logits, row);
  EXPECT_EQ(token.token_id, 0u);
  EXPECT_NEAR(token.logprob, std::log(0.2), 16 * kUnit);
  ASSERT_EQ(token.top.size(), 2u);
  EXPECT_EQ(token.top[0].token_id, 1u);
  EXPECT_NEAR(token.top[0].logprob, std::log(0.5), 16 * kUnit);
  EXPECT_EQ(token.top[1].token_id, 0u);
  row.num_logprobs = 0;
  EXPECT_TRUE(Sample(logits, row).top.empty());
  row.num_logprobs = -1;
  EXPECT_EQ(Sample(logits, row).logprob, 0.0f);
}

TEST(SampleTest, BatchMatesAndThreadsChangeNothing) {
  const int64_t rows = 9, vocab = 333;
  const std::vector<float> logits = RandomTensors(6).Normals(rows * vocab, 2.0f);
  std::vector<SamplingRow> requests(rows);
  for (int64_t i = 0; i < rows; ++i) {
    requests[i].row = rows - 1 - i;
    requests[i].temperature = i % 3 == 0 ? 0.0f : 0.7f;
    requests[i].top_p = i % 2 == 0 ? 1.0f : 0.9f;
    requests[i].seed = static_cast<uint64_t>(i);
  }
  for (const int threads : {1, 3}) {
    const auto backend = *MakeCpuBackend(threads);
    const TestTensor tensor(*backend, rows, vocab, logits, /*gap=*/2);
    std::vector<SampledToken> together(rows);
    backend->Sample(tensor.view(), requests, absl::MakeSpan(together));
    for (int64_t i = 0; i < rows; ++i) {
      const std::vector<float> row(logits.begin() + requests[i].row * vocab,
                                   logits.begin() + (requests[i].row + 1) * vocab);
      EXPECT_EQ(together[i].token_id, Sample(row, requests[i]).token_id) << i;
    }
  }
}

TEST(ScoreTest, GivesTheIdsLogprobAndTheTop) {
  const auto backend = *MakeCpuBackend(1);
  const std::vector<float> logits = {
      9, 9, 9, 9, std::log(0.2f), std::log(0.5f), std::log(0.2f), std::log(0.1f)};
  const TestTensor tensor(*backend, 2, 4, logits);
  const SampledToken score = backend->Score(tensor.view(), 1, 3, 1);
  EXPECT_TRUE(score.finite);
  EXPECT_EQ(score.token_id, 3u);
  EXPECT_NEAR(score.logprob, std::log(0.1), 16 * kUnit);
  ASSERT_EQ(score.top.size(), 1u);
  EXPECT_EQ(score.top[0].token_id, 1u);
}

}  // namespace
}  // namespace sluice
