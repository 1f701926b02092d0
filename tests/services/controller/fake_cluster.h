// A controller's loop with its public and admin services over real gRPC, and a worker that is none:
// FakeStage behind the Pipeline interface. Steps are answered at once, or held until the test lets
// them go.
#pragma once

#include <grpcpp/create_channel.h>
#include <gtest/gtest.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "services/controller/admin_service.h"
#include "services/controller/controller_loop.h"
#include "services/controller/generation_service.h"
#include "services/controller/model_service.h"
#include "services/rpc/server_runner.h"
#include "tests/services/controller/fake_stage.h"
#include "tests/services/controller/test_model.h"

namespace sluice::controller {

// Runs steps on a thread of its own.
class FakePipeline final : public Pipeline {
 public:
  ~FakePipeline() override { Close(); }

  void Open(uint64_t epoch, const std::vector<std::string>& addresses,
            PipelineListener* listener) override;
  void Send(const internal::v1::StepHeader& step) override;
  void Close() override;

  // Steps wait from now on; Release lets `steps` of them go, or all and all later ones.
  void Hold() { SetAllowed(0); }
  void Release(int64_t steps = INT64_MAX) { SetAllowed(steps); }

  std::function<void(internal::v1::TokenFrame)> on_frame;
  uint32_t num_blocks = 0;

  std::vector<std::string> errors() {
    std::lock_guard<std::mutex> lock(mutex_);
    return errors_;
  }

 private:
  void SetAllowed(int64_t steps) {
    std::lock_guard<std::mutex> lock(mutex_);
    allowed_ = steps;
    wake_.notify_all();
  }
  void Run(uint64_t epoch, PipelineListener* listener);

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<internal::v1::StepHeader> steps_;
  std::vector<std::string> errors_;
  int64_t allowed_ = INT64_MAX;
  bool closed_ = true;
  std::thread thread_;
};

inline void FakePipeline::Open(uint64_t epoch, const std::vector<std::string>& addresses,
                               PipelineListener* listener) {
  Close();
  closed_ = false;
  thread_ = std::thread([this, epoch, listener] { Run(epoch, listener); });
}

inline void FakePipeline::Send(const internal::v1::StepHeader& step) {
  std::lock_guard<std::mutex> lock(mutex_);
  steps_.push_back(step);
  wake_.notify_all();
}

inline void FakePipeline::Close() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    steps_.clear();
    wake_.notify_all();
  }
  if (thread_.joinable()) {
    thread_.join();
  }
}

inline void FakePipeline::Run(uint64_t epoch, PipelineListener* listener) {
  FakeStage stage({epoch, 1, 1u << 20, 32, 512, 4});
  listener->OnPipelineOpen(epoch);
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return closed_ || (!steps_.empty() && allowed_ > 0); });
    if (closed_) {
      return;
    }
    if (allowed_ != INT64_MAX) {
      --allowed_;
    }
    const internal::v1::StepHeader step = std::move(steps_.front());
    steps_.pop_front();
    internal::v1::TokenFrame frame = stage.Run(step);
    errors_.insert(errors_.end(), stage.errors.begin(), stage.errors.end());
    lock.unlock();
    on_frame(std::move(frame));
    lock.lock();
  }
}

// A worker that has loaded as soon as it is told to.
class ReadyWorker final : public OrderChannel {
 public:
  ReadyWorker(ControllerLoop* loop, uint64_t attachment) : loop_(loop), attachment_(attachment) {}
  void Send(const internal::v1::AttachResponse& order) override {
    if (order.has_configure()) {
      internal::v1::AttachRequest event;
      event.mutable_ready()->set_epoch(order.configure().epoch());
      loop_->OnWorkerEvent(attachment_, event);
    }
  }
  void Close() override {}

 private:
  ControllerLoop* const loop_;
  const uint64_t attachment_;
};

class FakeCluster {
 public:
  FakeCluster() {
    LoopOptions options;
    options.coordinator.expected_workers = 1;
    options.coordinator.plan.max_batch_size = 4;
    options.max_queue = 2;
    loop = std::make_unique<ControllerLoop>(options, &pipeline, [this](bool ready) {
      std::lock_guard<std::mutex> lock(mutex_);
      ready_ = ready;
      if (server_ != nullptr) {
        server_->SetReady(ready);
      }
      changed_.notify_all();
    });
    pipeline.on_frame = [this](internal::v1::TokenFrame frame) { loop->OnFrame(std::move(frame)); };
    generation_ = std::make_unique<GenerationService>(GenerationOptions(), loop.get(), &calls_);
    model_ = std::make_unique<ModelService>(loop.get(), &calls_);
    admin_ = std::make_unique<AdminService>(loop.get());
    rpc::ServerOptions server;
    server.addresses = {"127.0.0.1:0"};
    server.kind = rpc::ServerKind::kPublic;
    server.ready_names = {"sluice.v1.GenerationService"};
    auto started =
        rpc::ServerRunner::Start(server, {generation_.get(), model_.get(), admin_.get()});
    EXPECT_TRUE(started.ok()) << started.status();
    server_ = *std::move(started);
    channel = grpc::CreateChannel("127.0.0.1:" + std::to_string(server_->ports()[0]),
                                  grpc::InsecureChannelCredentials());
    generation = v1::GenerationService::NewStub(channel);
    models = v1::ModelService::NewStub(channel);
    admin = v1::AdminService::NewStub(channel);
    loop->Start("controller:1");
    loop->SetModel(MakeTestModel());
  }

  ~FakeCluster() {
    pipeline.Release();
    server_->Shutdown(0);
    loop->Stop();
  }

  // A worker attaches, loads at once, and the pipeline opens.
  void AttachWorker() {
    internal::v1::WorkerHello hello;
    hello.set_worker_id("w0");
    hello.set_device_kind("cpu");
    hello.set_device_name("fake");
    hello.set_memory_bytes(256 << 20);
    hello.add_addresses("unix:/w0");
    hello.set_protocol_version(1);
    ++attachment_;
    const absl::Status status =
        loop->OnHello(attachment_, hello, std::make_shared<ReadyWorker>(loop.get(), attachment_));
    ASSERT_TRUE(status.ok()) << status;
    WaitReady(true);
  }

  void LoseWorker() { loop->OnDetached(attachment_); }

  void WaitReady(bool ready) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return ready_ == ready; });
  }

  v1::GetClusterResponse Cluster() {
    grpc::ClientContext context;
    v1::GetClusterResponse response;
    EXPECT_TRUE(admin->GetCluster(&context, {}, &response).ok());
    return response;
  }

  // Asks until the answer pleases; the test's own timeout ends a wait in vain.
  void WaitForCluster(const std::function<bool(const v1::GetClusterResponse&)>& pleases) {
    while (!pleases(Cluster())) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
  void WaitIdle() {
    WaitForCluster([](const v1::GetClusterResponse& cluster) {
      return cluster.has_scheduler() && cluster.scheduler().used_blocks() == 0 &&
             cluster.scheduler().running_sequences() == 0 &&
             cluster.scheduler().queued_requests() == 0;
    });
  }

  FakePipeline pipeline;
  std::unique_ptr<ControllerLoop> loop;
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::GenerationService::Stub> generation;
  std::unique_ptr<v1::ModelService::Stub> models;
  std::unique_ptr<v1::AdminService::Stub> admin;

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ready_ = false;
  uint64_t attachment_ = 0;
  ClientCalls calls_{ClientLimits()};
  std::unique_ptr<GenerationService> generation_;
  std::unique_ptr<ModelService> model_;
  std::unique_ptr<AdminService> admin_;
  std::unique_ptr<rpc::ServerRunner> server_;
};

}  // namespace sluice::controller
