// Pulling a shard over a real connection: resume, checksums, errors that are final, cancellation.
#include "worker/shard_fetcher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <thread>

#include "services/rpc/server_runner.h"
#include "tests/worker/fake_engine.h"
#include "tests/worker/fake_weights.h"
#include "worker/tensor_assembler.h"

namespace sluice::worker {
namespace {

using ::testing::HasSubstr;

// Keeps what comes.
class Collector final : public StageEngine::Loader {
 public:
  absl::Status Add(const std::string& name, QuantizedMatrix tensor) override {
    EXPECT_EQ(tensors.count(name), 0u) << name << " came twice";
    tensors[name] =
        std::string(reinterpret_cast<const char*>(tensor.planes.data()), tensor.planes.size());
    return add_status;
  }
  absl::StatusOr<std::unique_ptr<StageEngine>> Finish() override {
    return absl::UnimplementedError("");
  }
  std::map<std::string, std::string> tensors;
  absl::Status add_status = absl::OkStatus();
};

class ShardFetcherTest : public ::testing::Test {
 protected:
  void SetUp() override {
    rpc::ServerOptions options;
    options.addresses = {"127.0.0.1:0"};
    server_ = *rpc::ServerRunner::Start(options, {&weights_});
    assignment_.set_model_digest("digest");
    assignment_.mutable_layers()->set_begin(2);
    assignment_.mutable_layers()->set_end(5);
    assignment_.set_loader_address("127.0.0.1:" + std::to_string(server_->ports().front()));
    options_.max_tensor_bytes = 1 << 20;
  }
  absl::Status Fetch() { return FetchShard(assignment_, options_, &loader_, &cancellation_); }
  void ExpectAllTensors() {
    ASSERT_EQ(loader_.tensors.size(), 3u);
    for (uint32_t layer = 2; layer < 5; ++layer) {
      EXPECT_EQ(loader_.tensors["layers." + std::to_string(layer) + ".weight"],
                FakeWeights::Bytes(layer));
    }
  }

  FakeWeights weights_;
  std::unique_ptr<rpc::ServerRunner> server_;
  internal::v1::ShardAssignment assignment_;
  FetchOptions options_;
  Collector loader_;
  Cancellation cancellation_;
};

TEST_F(ShardFetcherTest, FetchesTheShardAndTellsProgress) {
  uint64_t done = 0, total = 0;
  options_.on_progress = [&](uint64_t d, uint64_t t) { done = d, total = t; };
  ASSERT_TRUE(Fetch().ok());
  ExpectAllTensors();
  EXPECT_EQ(done, 3 * FakeWeights::kTensorBytes);
  EXPECT_EQ(total, 3 * FakeWeights::kTensorBytes);
}

TEST_F(ShardFetcherTest, ResumesWithinAndBetweenTensors) {
  // Streams of 5, then of 4 new parts and so on: breaks within a tensor and exactly after one.
  for (const int parts : {2, 3, 4, 5}) {
    loader_.tensors.clear();
    weights_.break_after = parts;
    ASSERT_TRUE(Fetch().ok()) << parts;
    ExpectAllTensors();
  }
  const auto requests = weights_.requests();
  EXPECT_EQ(requests[1].resume_name(), "layers.2.weight");
  EXPECT_EQ(requests[1].resume_part(), 2u);
}

TEST_F(ShardFetcherTest, FetchesADamagedPartAgain) {
  weights_.damage_part = 6;
  ASSERT_TRUE(Fetch().ok());
  ExpectAllTensors();
  const auto requests = weights_.requests();
  ASSERT_EQ(requests.size(), 2u);
  EXPECT_EQ(requests[1].resume_name(), "layers.3.weight");
  EXPECT_EQ(requests[1].resume_part(), 2u);
}

TEST_F(ShardFetcherTest, FinalErrorsAreNotRetried) {
  weights_.fail = true;
  EXPECT_EQ(Fetch().code(), absl::StatusCode::kFailedPrecondition);
  weights_.fail = false;
  weights_.wrong_bytes = true;
  absl::Status status = Fetch();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("TensorSpec.bytes"));
  weights_.wrong_bytes = false;
  options_.max_tensor_bytes = FakeWeights::kTensorBytes - 1;
  status = Fetch();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("--memory"));
  options_.max_tensor_bytes = 1 << 20;
  loader_.add_status = absl::InternalError("the device has no memory left");
  EXPECT_EQ(Fetch(), loader_.add_status);
  EXPECT_EQ(weights_.requests().size(), 4u);
}

TEST_F(ShardFetcherTest, CancellationEndsASilentStream) {
  weights_.hang = true;
  std::thread canceller([&] {
    while (weights_.parts_sent == 0) {
      std::this_thread::yield();
    }
    cancellation_.Cancel();
  });
  EXPECT_EQ(Fetch().code(), absl::StatusCode::kCancelled);
  canceller.join();
}

TEST(SpecFromProto, RefusesUnknownNumbers) {
  internal::v1::TensorSpec spec;
  spec.set_name("t");
  spec.set_n(4);
  spec.set_k(8);
  spec.set_plain_dtype(1);
  spec.set_bytes(64);
  EXPECT_TRUE(SpecFromProto(spec).ok());
  auto bad = spec;
  bad.set_format(9);
  EXPECT_THAT(SpecFromProto(bad).status().ToString(), HasSubstr("TensorSpec.format = 9"));
  bad = spec;
  bad.set_plain_dtype(300);
  EXPECT_FALSE(SpecFromProto(bad).ok());
  bad = spec;
  bad.set_n(~0ull);
  EXPECT_FALSE(SpecFromProto(bad).ok());
  bad = spec;
  bad.set_n(0);
  EXPECT_FALSE(SpecFromProto(bad).ok());
}

}  // namespace
}  // namespace sluice::worker
