// Scheduler and block pool under seeded random use on a fake clock: arrivals, cancels, deadlines,
// stop strings, tokens that end a text, lost workers. Every seed checks the invariants after every
// event. A failure prints the seed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>
#include <map>
#include <random>
#include <set>

#include "services/controller/scheduler.h"
#include "tests/services/controller/fake_stage.h"

namespace sluice::controller {
namespace {

using internal::v1::StepHeader;
using std::chrono::microseconds;

// One answer as its client sees it.
struct Expectation {
  RequestSpec spec;
  std::vector<uint32_t> history;  // Prompt and tokens
  uint32_t tokens = 0;
  bool ended = false;
};

class Simulation {
 public:
  explicit Simulation(uint64_t seed) : random_(seed) { NewEpoch(); }

  void Run(int events) {
    for (int i = 0; i < events && !testing::Test::HasFailure(); ++i) {
      Event();
      Check();
    }
    Finish();
  }

  uint64_t tokens_seen = 0;
  uint64_t lost = 0;

 private:
  uint32_t Random(uint32_t below) { return static_cast<uint32_t>(random_() % below); }

  void NewEpoch() {
    limits_.epoch = ++epoch_;
    limits_.stages = 1 + Random(4);
    limits_.num_blocks = 8 + Random(60);
    limits_.block_size = 1 + Random(8);
    limits_.max_batch_tokens = 2 + Random(24);
    limits_.max_batch_size = 1 + Random(12);
    limits_.max_queue = Random(6);
    scheduler_ = std::make_unique<Scheduler>(limits_);
    stage_ = std::make_unique<FakeStage>(FakeStage::Limits{
        limits_.epoch, limits_.stages, limits_.num_blocks, limits_.block_size,
        limits_.max_batch_tokens, std::min(limits_.max_batch_size, limits_.max_batch_tokens)});
    flying_.clear();
  }

  void Event() {
    now_ += microseconds(Random(2000));
    switch (Random(16)) {
      case 0:
      case 1:
      case 2:
        Arrive();
        break;
      case 3:
        if (Random(4) == 0) {
          DropOne();
        }
        break;
      case 4:
        if (Random(4) == 0) {
          CancelOne();
        }
        break;
      case 5:
        StopOne();
        break;
      case 6:
        scheduler_->Expire(now_);
        break;
      case 7:
        if (Random(60) == 0) {
          Lose();
        }
        break;
      default:
        ReturnFrame();
        break;
    }
    Send();
    Collect();
  }

  void Arrive() {
    const uint64_t handle = next_handle_++;
    RequestSpec spec;
    spec.prompt.resize(1 + Random(40));
    for (uint32_t& id : spec.prompt) {
      id = Random(FakeStage::kVocabSize);
    }
    spec.max_tokens = 1 + Random(30);
    spec.n = Random(5) == 0 ? 1 + Random(3) : 1;
    if (Random(3) == 0) {
      spec.end_ids = {Random(FakeStage::kVocabSize)};
    }
    spec.sampling.set_min_tokens(Random(std::min(4u, spec.max_tokens)));
    if (Random(4) == 0) {
      spec.deadline = now_ + microseconds(Random(60000));
    }
    const absl::Status status = scheduler_->Submit(now_, handle, spec);
    if (!status.ok()) {
      EXPECT_THAT(status.code(), testing::AnyOf(absl::StatusCode::kResourceExhausted,
                                                absl::StatusCode::kDeadlineExceeded));
      return;
    }
    for (uint32_t choice = 0; choice < spec.n; ++choice) {
      answers_[{handle, choice}] = {spec, spec.prompt};
    }
  }

  // A handle that lives, if any.
  std::optional<std::pair<uint64_t, uint32_t>> AnyLive() {
    std::vector<std::pair<uint64_t, uint32_t>> live;
    for (const auto& [key, answer] : answers_) {
      if (!answer.ended) {
        live.push_back(key);
      }
    }
    if (live.empty()) {
      return std::nullopt;
    }
    return live[Random(static_cast<uint32_t>(live.size()))];
  }

  void EndAll(uint64_t handle) {
    for (auto& [key, answer] : answers_) {
      if (key.first == handle) {
        answer.ended = true;
      }
    }
  }

  void DropOne() {
    if (const auto key = AnyLive()) {
      Collect();
      scheduler_->Drop(key->first);
      EndAll(key->first);
    }
  }

  void CancelOne() {
    if (const auto key = AnyLive()) {
      scheduler_->Cancel(key->first);
    }
  }

  void StopOne() {
    const auto key = AnyLive();
    if (key.has_value() && answers_[*key].tokens > 0 && Random(8) == 0) {
      scheduler_->EndSequence(key->first, key->second);
      answers_[*key].ended = true;
    }
  }

  void Lose() {
    ++lost;
    scheduler_->FailAll(absl::UnavailableError("lost"));
    Collect();
    for (const auto& [key, answer] : answers_) {
      EXPECT_TRUE(answer.ended) << "request " << key.first << " outlived its pipeline";
    }
    EXPECT_EQ(scheduler_->blocks().used(), 0u);
    NewEpoch();
  }

  void Send() {
    StepHeader step;
    while (scheduler_->NextStep(now_, &step)) {
      if (step.sequences().empty()) {
        EXPECT_TRUE(flying_.empty()) << "a step without rows while others fly";
        EXPECT_GT(step.released_seq_ids_size(), 0);
      }
      flying_.push_back(step);
    }
    std::map<uint32_t, int> by_slot;
    int with_rows = 0;
    for (const StepHeader& one : flying_) {
      if (!one.sequences().empty()) {
        ++with_rows;
        EXPECT_LE(++by_slot[one.slot()], 2);
      }
    }
    EXPECT_LE(with_rows, static_cast<int>(limits_.stages) + 1);
  }

  void ReturnFrame() {
    if (flying_.empty()) {
      return;
    }
    const internal::v1::TokenFrame frame = stage_->Run(flying_.front());
    flying_.pop_front();
    EXPECT_THAT(stage_->errors, testing::IsEmpty());
    const absl::Status status = scheduler_->OnFrame(now_, frame);
    EXPECT_TRUE(status.ok()) << status;
    if (Random(10) == 0) {
      EXPECT_TRUE(scheduler_->OnFrame(now_, frame).ok());  // Again: ignored
    }
  }

  void Collect() {
    for (const SchedulerEvent& event : scheduler_->TakeEvents()) {
      const auto key = std::make_pair(event.handle, event.choice);
      switch (event.kind) {
        case SchedulerEvent::Kind::kToken:
          OnToken(&answers_.at(key), event);
          break;
        case SchedulerEvent::Kind::kDone:
          EXPECT_FALSE(answers_.at(key).ended) << "ended twice";
          answers_[key].ended = true;
          break;
        case SchedulerEvent::Kind::kFailed:
          OnFailed(event.handle);
          break;
        default:
          break;
      }
    }
  }

  void OnToken(Expectation* answer, const SchedulerEvent& event) {
    ++tokens_seen;
    EXPECT_FALSE(answer->ended) << "a token after the end";
    EXPECT_EQ(event.token.token_index(), answer->tokens) << "indices are dense";
    EXPECT_EQ(event.token.token_id(), FakeStage::NextToken(answer->history, event.choice));
    answer->history.push_back(event.token.token_id());
    ++answer->tokens;
    EXPECT_LE(answer->tokens, answer->spec.max_tokens);
  }

  void OnFailed(uint64_t handle) {
    int ended = 0;
    for (auto& [key, answer] : answers_) {
      if (key.first == handle && !answer.ended) {
        answer.ended = true;
        ++ended;
      }
    }
    EXPECT_GT(ended, 0) << "a request that had ended failed";
  }

  void Check() {
    const BlockAllocator& blocks = scheduler_->blocks();
    EXPECT_EQ(blocks.free() + blocks.used() + blocks.cached(), blocks.total());
    std::set<uint32_t> owned;
    size_t count = 0;
    for (const auto& [seq_id, table] : scheduler_->BlockTables()) {
      owned.insert(table.begin(), table.end());
      count += table.size();
    }
    EXPECT_EQ(owned.size(), count) << "two sequences share a block";
    EXPECT_EQ(blocks.used(), count);
    EXPECT_LE(scheduler_->counts().queued_requests, limits_.max_queue);
    for (auto it = answers_.begin(); it != answers_.end();) {
      it = it->second.ended ? answers_.erase(it) : std::next(it);
    }
  }

  // Nothing arrives any more: everything must end by itself.
  void Finish() {
    for (int i = 0; i < 100000 && !testing::Test::HasFailure(); ++i) {
      Send();
      if (flying_.empty()) {
        break;
      }
      ReturnFrame();
      Collect();
    }
    Check();
    EXPECT_TRUE(answers_.empty()) << answers_.size() << " answers never ended";
    EXPECT_EQ(scheduler_->blocks().used(), 0u);
    EXPECT_EQ(stage_->num_tables(), 0u) << "the stages still hold sequences";
  }

  std::mt19937_64 random_;
  SchedulerLimits limits_;
  uint64_t epoch_ = 0;
  uint64_t next_handle_ = 1;
  TimePoint now_{std::chrono::hours(1)};
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<FakeStage> stage_;
  std::deque<StepHeader> flying_;
  std::map<std::pair<uint64_t, uint32_t>, Expectation> answers_;
};

class SchedulerSimulationTest : public testing::TestWithParam<uint64_t> {};

TEST_P(SchedulerSimulationTest, KeepsItsInvariants) {
  SCOPED_TRACE("seed " + std::to_string(GetParam()));
  Simulation simulation(GetParam());
  simulation.Run(4000);
  EXPECT_GT(simulation.tokens_seen, 500u);
}

INSTANTIATE_TEST_SUITE_P(Seeds, SchedulerSimulationTest, testing::Range<uint64_t>(1, 25));

}  // namespace
}  // namespace sluice::controller
