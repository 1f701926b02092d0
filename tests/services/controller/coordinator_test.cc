#include "services/controller/coordinator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "services/rpc/error_details.h"
#include "tests/services/plan/plan_models.h"

namespace sluice::controller {
namespace {

using internal::v1::AttachRequest;
using internal::v1::AttachResponse;
using internal::v1::WorkerHello;
using testing::ElementsAre;
using testing::IsEmpty;
using testing::SizeIs;
using State = Coordinator::State;

class RecordingChannel : public OrderChannel {
 public:
  void Send(const AttachResponse& order) override { orders.push_back(order); }
  void Close() override { closed = true; }
  const internal::v1::ConfigureOrder& last_configure() const { return orders.back().configure(); }

  std::vector<AttachResponse> orders;
  bool closed = false;
};

class CoordinatorTest : public testing::Test, public Coordinator::Observer {
 protected:
  void OpenPipeline(uint64_t epoch, const std::vector<std::string>& addresses) override {
    opened.push_back(epoch);
    open_addresses = addresses;
  }
  void OnServing(uint64_t epoch, const plan::DeviceMapPlan& plan) override {
    served.push_back(epoch);
  }
  void OnLost(const absl::Status& status) override { lost.push_back(status); }

  void Make(uint32_t workers) {
    options_.expected_workers = workers;
    options_.loader_address = "loader:1";
    options_.controller_address = "controller:1";
    options_.host_id = "host-a";
    coordinator_ = std::make_unique<Coordinator>(options_, this);
    coordinator_->SetModel(now_, std::make_shared<internal::v1::PlanShardsResponse>(
                                     plan::SmallLlama(4, 1 << 20, 1 << 20, false)));
  }

  static WorkerHello Hello(int device, const std::string& host = "host-a") {
    WorkerHello hello;
    hello.set_worker_id("w" + std::to_string(device));
    hello.set_host_id(host);
    hello.set_device_kind("cpu");
    hello.set_memory_bytes(256 << 20);
    hello.add_addresses("unix:/w" + std::to_string(device));
    hello.add_addresses("127.0.0.1:900" + std::to_string(device));
    hello.set_protocol_version(1);
    hello.set_device_index(device);
    return hello;
  }

  std::shared_ptr<RecordingChannel> Attach(uint64_t attachment, const WorkerHello& hello) {
    auto channel = std::make_shared<RecordingChannel>();
    const absl::Status status = coordinator_->OnHello(now_, attachment, hello, channel);
    EXPECT_TRUE(status.ok()) << status;
    return channel;
  }

  void Ready(uint64_t attachment, uint64_t epoch) {
    AttachRequest event;
    event.mutable_ready()->set_epoch(epoch);
    event.mutable_ready()->set_transport("unix");
    coordinator_->OnEvent(now_, attachment, event);
  }

  // Two workers that serve.
  void Serve() {
    Make(2);
    first_ = Attach(1, Hello(0));
    second_ = Attach(2, Hello(1));
    Ready(1, 1);
    Ready(2, 1);
    coordinator_->OnPipelineOpen(1);
    ASSERT_EQ(coordinator_->state(), State::kServing);
  }

  TimePoint now_{std::chrono::hours(1)};
  CoordinatorOptions options_;
  std::unique_ptr<Coordinator> coordinator_;
  std::shared_ptr<RecordingChannel> first_, second_;
  std::vector<uint64_t> opened, served;
  std::vector<std::string> open_addresses;
  std::vector<absl::Status> lost;
};

TEST_F(CoordinatorTest, WaitsForAllWorkersThenConfiguresEachStage) {
  Make(2);
  const auto first = Attach(1, Hello(0));
  EXPECT_EQ(coordinator_->state(), State::kWaiting);
  EXPECT_THAT(first->orders, IsEmpty());
  EXPECT_THAT(coordinator_->reason(), testing::HasSubstr("1 of 2"));
  const auto second = Attach(2, Hello(1));
  ASSERT_EQ(coordinator_->state(), State::kLoading) << coordinator_->reason();
  const auto& a = first->last_configure().assignment();
  const auto& b = second->last_configure().assignment();
  EXPECT_EQ(first->last_configure().epoch(), 1u);
  EXPECT_EQ(a.stage(), 0u);
  EXPECT_EQ(b.stage(), 1u);
  EXPECT_EQ(a.stages(), 2u);
  EXPECT_TRUE(a.has_embedding());
  EXPECT_TRUE(b.has_head());
  EXPECT_EQ(a.layers().end(), b.layers().begin());
  EXPECT_EQ(b.layers().end(), 4u);
  EXPECT_EQ(a.num_blocks(), b.num_blocks());
  EXPECT_GT(a.num_blocks(), 0u);
  EXPECT_EQ(a.loader_address(), "loader:1");
  EXPECT_EQ(a.controller_address(), "controller:1");
  EXPECT_THAT(a.next_addresses(), ElementsAre("unix:/w1", "127.0.0.1:9001"));
  EXPECT_THAT(b.next_addresses(), ElementsAre("unix:/w0", "127.0.0.1:9000")) << "the ring";
}

TEST_F(CoordinatorTest, ServesWhenAllAreReadyAndTheStreamIsOpen) {
  Make(2);
  Attach(1, Hello(0));
  Attach(2, Hello(1));
  Ready(2, 1);
  EXPECT_THAT(opened, IsEmpty());
  Ready(1, 1);
  EXPECT_THAT(opened, ElementsAre(1));
  EXPECT_THAT(open_addresses, ElementsAre("unix:/w0", "127.0.0.1:9000"));
  EXPECT_THAT(served, IsEmpty());
  coordinator_->OnPipelineOpen(1);
  EXPECT_THAT(served, ElementsAre(1));
  EXPECT_EQ(coordinator_->state(), State::kServing);
}

TEST_F(CoordinatorTest, OneWorkerHasNoNextStage) {
  Make(1);
  const auto channel = Attach(1, Hello(0));
  EXPECT_THAT(channel->last_configure().assignment().next_addresses(), IsEmpty());
  EXPECT_EQ(channel->last_configure().assignment().stages(), 1u);
}

TEST_F(CoordinatorTest, UnixSocketsStayOnTheirHost) {
  Make(2);
  const auto first = Attach(1, Hello(0, "host-a"));
  Attach(2, Hello(1, "host-b"));
  EXPECT_THAT(first->last_configure().assignment().next_addresses(), ElementsAre("127.0.0.1:9001"));
}

TEST_F(CoordinatorTest, ALostWorkerEndsThePlanAndItsReturnMakesANewEpoch) {
  Serve();
  coordinator_->OnDetached(now_, 2);
  EXPECT_EQ(coordinator_->state(), State::kWaiting);
  ASSERT_THAT(lost, SizeIs(1));
  EXPECT_EQ(lost[0].code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(rpc::GetDetail<google::rpc::RetryInfo>(lost[0]).has_value());
  EXPECT_EQ(first_->orders.back().halt().epoch(), 1u);
  const auto back = Attach(3, Hello(1));
  EXPECT_EQ(coordinator_->state(), State::kLoading);
  EXPECT_EQ(first_->last_configure().epoch(), 2u);
  EXPECT_EQ(back->last_configure().epoch(), 2u);
  Ready(1, 1);  // Late, of the epoch before
  Ready(3, 2);
  EXPECT_EQ(coordinator_->state(), State::kLoading);
  Ready(1, 2);
  coordinator_->OnPipelineOpen(1);
  EXPECT_EQ(coordinator_->state(), State::kConnecting);
  coordinator_->OnPipelineOpen(2);
  EXPECT_EQ(coordinator_->state(), State::kServing);
  EXPECT_THAT(served, ElementsAre(1, 2));
}

TEST_F(CoordinatorTest, AWorkerLostWhileLoadingIsALossToo) {
  Make(2);
  Attach(1, Hello(0));
  Attach(2, Hello(1));
  coordinator_->OnDetached(now_, 1);
  EXPECT_EQ(coordinator_->state(), State::kWaiting);
  Attach(3, Hello(0));
  EXPECT_EQ(coordinator_->state(), State::kLoading);
  EXPECT_EQ(coordinator_->epoch(), 2u);
}

TEST_F(CoordinatorTest, EpochsRiseAboveWhatWorkersHaveSeen) {
  Make(1);
  WorkerHello hello = Hello(0);
  hello.set_epoch(41);
  const auto channel = Attach(1, hello);
  EXPECT_EQ(channel->last_configure().epoch(), 42u);
}

TEST_F(CoordinatorTest, AFaultWaitsLongerEachTimeBeforeTheNextPlan) {
  Make(1);
  Attach(1, Hello(0));
  const auto fault = [&] {
    AttachRequest event;
    event.mutable_fault()->set_epoch(coordinator_->epoch());
    event.mutable_fault()->set_message("the loader is not there");
    coordinator_->OnEvent(now_, 1, event);
  };
  fault();
  EXPECT_EQ(coordinator_->state(), State::kWaiting);
  EXPECT_THAT(coordinator_->reason(), testing::HasSubstr("the loader is not there"));
  coordinator_->OnTick(now_);
  EXPECT_EQ(coordinator_->state(), State::kWaiting);
  now_ += std::chrono::milliseconds(500);
  coordinator_->OnTick(now_);
  EXPECT_EQ(coordinator_->state(), State::kLoading);
  fault();
  now_ += std::chrono::milliseconds(500);
  coordinator_->OnTick(now_);
  EXPECT_EQ(coordinator_->state(), State::kWaiting) << "the second wait is longer";
  now_ += std::chrono::milliseconds(500);
  coordinator_->OnTick(now_);
  EXPECT_EQ(coordinator_->state(), State::kLoading);
}

TEST_F(CoordinatorTest, ABrokenStreamOfAnOlderEpochIsIgnored) {
  Serve();
  coordinator_->OnPipelineLost(now_, 0, absl::UnavailableError("old"));
  EXPECT_EQ(coordinator_->state(), State::kServing);
  coordinator_->OnPipelineLost(now_, 1, absl::UnavailableError("broken"));
  EXPECT_THAT(lost, SizeIs(1));
}

TEST_F(CoordinatorTest, RefusesSecondNamesDevicesAndOtherVersions) {
  Make(3);
  Attach(1, Hello(0));
  const auto refused = [&](const WorkerHello& hello) {
    return coordinator_->OnHello(now_, 9, hello, std::make_shared<RecordingChannel>()).code();
  };
  WorkerHello same_id = Hello(0);
  same_id.set_device_index(5);
  EXPECT_EQ(refused(same_id), absl::StatusCode::kAlreadyExists);
  WorkerHello same_device = Hello(0);
  same_device.set_worker_id("other");
  EXPECT_EQ(refused(same_device), absl::StatusCode::kAlreadyExists);
  WorkerHello version = Hello(1);
  version.set_protocol_version(2);
  EXPECT_EQ(refused(version), absl::StatusCode::kFailedPrecondition);
  WorkerHello name = Hello(1);
  name.set_worker_id("With Space");
  EXPECT_EQ(refused(name), absl::StatusCode::kInvalidArgument);
}

TEST(CoordinatorModelTest, SaysWhyThereIsNoModel) {
  Coordinator coordinator(CoordinatorOptions(), nullptr);
  coordinator.OnModelRefused(absl::UnavailableError("connection refused"));
  EXPECT_THAT(coordinator.reason(), testing::StartsWith("waiting for the loader"));
  coordinator.OnModelRefused(absl::NotFoundError("no tokenizer"));
  EXPECT_EQ(coordinator.reason(), "the model cannot be served: no tokenizer");
}

TEST_F(CoordinatorTest, SaysWhyAModelDoesNotFit) {
  Make(1);
  WorkerHello hello = Hello(0);
  hello.set_memory_bytes(1 << 20);
  Attach(1, hello);
  EXPECT_EQ(coordinator_->state(), State::kWaiting);
  EXPECT_THAT(coordinator_->reason(), testing::Not(testing::HasSubstr("waiting for workers")));
  coordinator_->OnDetached(now_, 1);
  Attach(2, Hello(0));
  EXPECT_EQ(coordinator_->state(), State::kLoading) << "a larger worker is tried at once";
}

TEST_F(CoordinatorTest, MaxMemoryNamesTheDevicesAndCutsTheirLimits) {
  options_.max_memory = {{"0", 128 << 20}, {"1", uint64_t{1} << 40}};
  Make(0);
  Attach(1, Hello(0));
  EXPECT_EQ(coordinator_->expected_workers(), 2u);
  EXPECT_EQ(coordinator_->state(), State::kWaiting);
  Attach(2, Hello(1));
  EXPECT_EQ(coordinator_->state(), State::kLoading);
  const plan::MaxMemory limits = coordinator_->Limits();
  EXPECT_EQ(limits.at("0"), uint64_t{128} << 20);
  EXPECT_EQ(limits.at("1"), uint64_t{256} << 20);
}

}  // namespace
}  // namespace sluice::controller
