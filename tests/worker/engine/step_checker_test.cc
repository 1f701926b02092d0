#include "worker/engine/step_checker.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "tests/worker/engine/small_model.h"
#include "tests/worker/engine/test_pipeline.h"

namespace sluice::worker {
namespace {

using internal::v1::SamplingParams;
using internal::v1::SequenceSlice;
using internal::v1::ShardAssignment;
using internal::v1::StepHeader;
using testing::HasSubstr;

constexpr uint64_t kRowBytes = 128;

// A stage that has run step 5: sequence 1 at position 3 with blocks 0 (sampled in step 5), sequence
// 2 at position 4 with block 1.
class StepCheckerTest : public testing::Test {
 protected:
  StepCheckerTest() { Make(/*stage=*/0, /*stages=*/1); }

  void Make(uint32_t stage, uint32_t stages) {
    assignment_ = MakeAssignment(MakeLlama(1), stage, stages);
    checker_ = std::make_unique<StepChecker>(assignment_, kRowBytes);
    table_ = std::make_unique<SequenceTable>(
        SequenceTable::Options{.num_blocks = assignment_.num_blocks(),
                               .block_size = assignment_.block_size(),
                               .max_model_len = assignment_.max_model_len(),
                               .keep_history = assignment_.has_head()});
    SequenceSlice first = FirstSlice(1, 3, 0);
    first.set_sample(true);
    table_->Apply(5, first);
    table_->Apply(4, FirstSlice(2, 4, 1));
  }

  static SequenceSlice FirstSlice(uint64_t seq_id, uint32_t num_tokens, uint32_t block) {
    SequenceSlice slice;
    slice.set_seq_id(seq_id);
    slice.set_num_tokens(num_tokens);
    slice.set_prompt_len(num_tokens);
    *slice.mutable_sampling() = GreedyParams();
    for (uint32_t i = 0; i < num_tokens; ++i) slice.add_token_ids(i);
    slice.add_new_block_ids(block);
    return slice;
  }

  // A good step 6: sequence 1 decodes, sequence 2 too and gets a block, sequence 3 enters.
  static StepHeader GoodStep() {
    StepHeader header;
    header.set_step(6);
    SequenceSlice* one = header.add_sequences();
    one->set_seq_id(1);
    one->set_start_pos(3);
    one->set_num_tokens(1);
    one->add_token_ids(60);
    one->set_sample(true);
    one->set_token_index(1);
    SequenceSlice* two = header.add_sequences();
    two->set_seq_id(2);
    two->set_start_pos(4);
    two->set_num_tokens(1);
    two->add_token_ids(0);
    two->add_new_block_ids(63);
    *header.add_sequences() = FirstSlice(3, 4, 62);
    return header;
  }

  absl::Status Check(const StepHeader& header, uint64_t hidden_bytes = 0) {
    return checker_->Check(header, hidden_bytes, /*last_step=*/5, *table_);
  }
  void ExpectRefused(const StepHeader& header, const std::string& words,
                     uint64_t hidden_bytes = 0) {
    const absl::Status status = Check(header, hidden_bytes);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << words << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(words));
  }
  // A good step with one change.
  void ExpectRefused(const std::function<void(StepHeader*)>& change, const std::string& words) {
    StepHeader header = GoodStep();
    ASSERT_TRUE(Check(header).ok()) << Check(header);
    change(&header);
    ExpectRefused(header, words);
  }

  ShardAssignment assignment_;
  std::unique_ptr<StepChecker> checker_;
  std::unique_ptr<SequenceTable> table_;
};

TEST_F(StepCheckerTest, StepsMustRise) {
  ExpectRefused([](StepHeader* h) { h->set_step(5); }, "step = 5");
  ExpectRefused([](StepHeader* h) { h->set_step(0); }, "step = 0");
}

TEST_F(StepCheckerTest, Batch) {
  ExpectRefused([](StepHeader* h) { *h->add_sequences() = h->sequences(0); }, "two slices");
  ExpectRefused([](StepHeader* h) { h->add_released_seq_ids(2); }, "released_seq_ids: 2");
  ExpectRefused(
      [](StepHeader* h) {
        for (uint64_t id = 10; id < 12; ++id) {
          *h->add_sequences() = FirstSlice(id, 1, static_cast<uint32_t>(id));
        }
      },
      "max_batch_size is 4");
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(2)->set_num_tokens(39); },
                "max_batch_tokens is 40");
  // The sum does not wrap around.
  ExpectRefused(
      [](StepHeader* h) {
        h->mutable_sequences(0)->set_num_tokens(1u << 31);
        h->mutable_sequences(1)->set_num_tokens(1u << 31);
      },
      "max_batch_tokens is 40");
  StepHeader only_releases;
  only_releases.set_step(6);
  only_releases.add_released_seq_ids(1);
  only_releases.add_released_seq_ids(77);
  EXPECT_TRUE(Check(only_releases).ok());
}

TEST_F(StepCheckerTest, Positions) {
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(0)->set_start_pos(4); }, "start_pos = 4");
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(0)->set_start_pos(2); }, "start_pos = 2");
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(0)->set_start_pos(0); }, "start_pos = 0");
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(0)->set_seq_id(9); }, "first slice");
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(2)->set_start_pos(1); }, "first slice");
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(1)->set_num_tokens(0); }, "num_tokens");
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(0)->set_token_index(4); }, "token_index");
  assignment_.set_max_model_len(4);
  checker_ = std::make_unique<StepChecker>(assignment_, kRowBytes);
  ExpectRefused(GoodStep(), "max_model_len is 4");
}

TEST_F(StepCheckerTest, FirstSlices) {
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(2)->clear_prompt_len(); }, "prompt_len");
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(2)->set_prompt_len(61); }, "prompt_len");
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(2)->clear_sampling(); }, "sampling");
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(0)->set_prompt_len(3); }, "prompt_len");
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(0)->mutable_sampling(); }, "sampling");
  Make(/*stage=*/0, /*stages=*/2);
  StepHeader header = GoodStep();
  header.mutable_sequences(2)->clear_sampling();  // Only the last stage needs it
  EXPECT_TRUE(Check(header).ok()) << Check(header);
}

TEST_F(StepCheckerTest, TokenIds) {
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(0)->set_token_ids(0, 61); },
                "vocab_size = 61");
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(2)->add_token_ids(1); }, "token_ids: 5");
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(2)->clear_token_ids(); }, "token_ids: 0");
}

TEST_F(StepCheckerTest, SampledByStep) {
  const auto ahead = [](StepHeader* h) {
    h->mutable_sequences(0)->clear_token_ids();
    h->mutable_sequences(0)->set_sampled_by_step(5);
  };
  ExpectRefused(ahead, "not here yet");
  table_->AddSampled(5, 1, 61);
  ExpectRefused(ahead, "its id 61");
  table_->AddSampled(5, 1, 60);
  StepHeader header = GoodStep();
  ahead(&header);
  EXPECT_TRUE(Check(header).ok()) << Check(header);
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(0)->set_sampled_by_step(5); },
                "token_ids must be empty");
  for (const uint64_t step : {4, 6, 7}) {
    header.mutable_sequences(0)->set_sampled_by_step(step);
    ExpectRefused(header, "did not sample");
  }
  header = GoodStep();  // Sequence 2 was not sampled; sequence 3 is new
  for (const int index : {1, 2}) {
    StepHeader wrong = GoodStep();
    wrong.mutable_sequences(index)->clear_token_ids();
    wrong.mutable_sequences(index)->set_num_tokens(1);
    wrong.mutable_sequences(index)->set_sampled_by_step(5);
    ExpectRefused(wrong, "did not sample");
  }
}

TEST_F(StepCheckerTest, MiddleStagesNeedNoIds) {
  Make(/*stage=*/1, /*stages=*/3);
  StepHeader header = GoodStep();
  header.mutable_sequences(0)->clear_token_ids();
  header.mutable_sequences(0)->set_sampled_by_step(5);
  EXPECT_TRUE(checker_->HasInputs(header, *table_));
  EXPECT_TRUE(Check(header, 6 * kRowBytes).ok());
}

TEST_F(StepCheckerTest, HasInputsWaitsOnlyForIdsThatCanCome) {
  StepHeader header = GoodStep();
  EXPECT_TRUE(checker_->HasInputs(header, *table_));
  header.mutable_sequences(0)->clear_token_ids();
  header.mutable_sequences(0)->set_sampled_by_step(5);
  EXPECT_FALSE(checker_->HasInputs(header, *table_));
  header.mutable_sequences(0)->set_sampled_by_step(4);  // Never comes: Check refuses it
  EXPECT_TRUE(checker_->HasInputs(header, *table_));
  header.mutable_sequences(0)->set_sampled_by_step(5);
  table_->AddSampled(5, 1, 7);
  EXPECT_TRUE(checker_->HasInputs(header, *table_));
}

TEST_F(StepCheckerTest, Blocks) {
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(1)->set_new_block_ids(0, 64); },
                "num_blocks = 64");
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(1)->set_new_block_ids(0, 0); },
                "new_block_ids: 0 belongs");
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(1)->set_new_block_ids(0, 1); },
                "new_block_ids: 1 belongs");
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(2)->set_new_block_ids(0, 63); },
                "given twice");
  ExpectRefused([](StepHeader* h) { h->mutable_sequences(1)->clear_new_block_ids(); },
                "do not hold 5 tokens");
  ExpectRefused(
      [](StepHeader* h) {
        for (uint32_t block = 2; block < 17; ++block) {
          h->mutable_sequences(2)->add_new_block_ids(block);
        }
      },
      "max_model_len needs 15");
  // Blocks of a sequence that this step releases are free.
  StepHeader header = GoodStep();
  header.mutable_sequences()->DeleteSubrange(0, 1);
  header.add_released_seq_ids(1);
  header.mutable_sequences(0)->set_new_block_ids(0, 0);
  EXPECT_TRUE(Check(header).ok()) << Check(header);
}

TEST_F(StepCheckerTest, HiddenBytesAreExact) {
  ExpectRefused(GoodStep(), "hidden_states", 1);
  Make(/*stage=*/1, /*stages=*/2);
  table_->AddSampled(5, 1, 7);
  EXPECT_TRUE(Check(GoodStep(), 6 * kRowBytes).ok());
  for (const uint64_t bytes : {uint64_t{0}, 6 * kRowBytes - 1, 6 * kRowBytes + 1}) {
    ExpectRefused(GoodStep(), "hidden_states", bytes);
  }
}

TEST(CheckSamplingTest, NamesTheField) {
  const auto message = [](const std::function<void(SamplingParams*)>& change) {
    SamplingParams params = GreedyParams();
    EXPECT_TRUE(CheckSampling(params, 61).ok());
    change(&params);
    const absl::Status status = CheckSampling(params, 61);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  for (const float bad : {-0.1f, kNan}) {
    EXPECT_THAT(message([=](auto* p) { p->set_temperature(bad); }), HasSubstr("temperature"));
    EXPECT_THAT(message([=](auto* p) { p->set_min_p(bad); }), HasSubstr("min_p"));
    EXPECT_THAT(message([=](auto* p) { p->set_top_p(bad); }), HasSubstr("top_p"));
    EXPECT_THAT(message([=](auto* p) { p->set_repetition_penalty(bad); }),
                HasSubstr("repetition_penalty"));
  }
  EXPECT_THAT(message([](auto* p) { p->set_top_p(0); }), HasSubstr("top_p"));
  EXPECT_THAT(message([](auto* p) { p->set_min_p(1.5f); }), HasSubstr("min_p"));
  EXPECT_THAT(message([](auto* p) { p->set_top_k(0xffffffff); }), HasSubstr("top_k"));
  EXPECT_THAT(message([](auto* p) { p->set_presence_penalty(kNan); }), HasSubstr("presence"));
  EXPECT_THAT(message([](auto* p) { p->set_frequency_penalty(kNan); }), HasSubstr("frequency"));
  EXPECT_THAT(message([](auto* p) { p->set_num_logprobs(-2); }), HasSubstr("num_logprobs"));
  EXPECT_THAT(message([](auto* p) { p->set_num_prompt_logprobs(62); }), HasSubstr("num_prompt"));
  EXPECT_THAT(message([](auto* p) { p->add_banned_until_min(61); }), HasSubstr("banned"));
}

}  // namespace
}  // namespace sluice::worker
