// The loop between threads, without gRPC: clients that submit, drop and cancel at once while the
// worker goes and comes back. Made for ThreadSanitizer (./dev sanitize thread).
#include "services/controller/controller_loop.h"

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "services/metrics/page.h"
#include "tests/services/controller/fake_cluster.h"
#include "tests/services/controller/test_model.h"

namespace sluice::controller {
namespace {

// Counts what comes; OnEnd exactly once. Keeps no absl::Status: Debian's Abseil, which counts its
// users, is not instrumented.
class CountingSink final : public ResponseSink {
 public:
  void OnMessage(v1::StreamGenerateResponse&& message) override {
    std::lock_guard<std::mutex> lock(mutex_);
    EXPECT_FALSE(code_.has_value());
    tokens_ += message.token_ids_size();
    changed_.notify_all();
  }
  void OnEnd(const absl::Status& status) override {
    std::lock_guard<std::mutex> lock(mutex_);
    EXPECT_FALSE(code_.has_value());
    code_ = status.code();
    changed_.notify_all();
  }
  absl::StatusCode Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return code_.has_value(); });
    return *code_;
  }
  int tokens() {
    std::lock_guard<std::mutex> lock(mutex_);
    return tokens_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int tokens_ = 0;
  std::optional<absl::StatusCode> code_;
};

class ControllerLoopTest : public testing::Test {
 protected:
  ControllerLoopTest() : loop_(Options(), &pipeline_, [](bool) {}) {
    pipeline_.on_frame = [this](internal::v1::TokenFrame frame) {
      loop_.OnFrame(std::move(frame));
    };
    model_ = MakeTestModel();
    loop_.Start("controller:1");
    loop_.SetModel(model_);
  }
  static LoopOptions Options() {
    LoopOptions options;
    options.coordinator.expected_workers = 1;
    options.coordinator.plan.max_batch_size = 4;
    options.max_queue = 1000;
    return options;
  }
  void Attach(uint64_t attachment) {
    internal::v1::WorkerHello hello;
    hello.set_worker_id("w0");
    hello.set_device_kind("cpu");
    hello.set_memory_bytes(256 << 20);
    hello.add_addresses("unix:/w0");
    hello.set_protocol_version(1);
    ASSERT_TRUE(
        loop_.OnHello(attachment, hello, std::make_shared<ReadyWorker>(&loop_, attachment)).ok());
    while (!loop_.serving()) {
      std::this_thread::yield();
    }
  }
  GenerationRequest Request(const std::string& id, uint32_t max_tokens) {
    GenerationRequest request;
    request.request_id = id;
    request.spec.prompt = {5, 6, 7};
    request.spec.max_tokens = max_tokens;
    request.tokenizer = model_->tokenizer;
    request.arrival = std::chrono::steady_clock::now();
    return request;
  }
  // A client's life: requests that end by themselves, are dropped, or are cancelled by their id.
  void RunClient(int client) {
    for (int i = 0; i < 30; ++i) {
      CountingSink sink;
      const std::string id = std::to_string(client) + "-" + std::to_string(i);
      const uint64_t handle = loop_.NewHandle();
      loop_.Submit(handle, Request(id, i % 3 == 0 ? 5 : 500), &sink);
      if (i % 3 == 1) {
        loop_.Drop(handle);
      } else if (i % 3 == 2) {
        loop_.CancelById(id, [](bool) {});
      }
      if (sink.Wait() == absl::StatusCode::kOk && i % 3 == 0) {
        EXPECT_EQ(sink.tokens(), 5);
      }
      metrics::Page page;
      loop_.Collect(&page);
    }
  }

  FakePipeline pipeline_;
  std::shared_ptr<const ServedModel> model_;
  ControllerLoop loop_;
};

TEST_F(ControllerLoopTest, ClientsAndAWorkerThatComesAndGoes) {
  Attach(1);
  std::vector<std::thread> clients;
  for (int client = 0; client < 4; ++client) {
    clients.emplace_back([this, client] { RunClient(client); });
  }
  for (uint64_t attachment = 1; attachment <= 3; ++attachment) {
    CountingSink sink;
    loop_.Submit(loop_.NewHandle(), Request("w" + std::to_string(attachment), 20), &sink);
    sink.Wait();  // Ended, or lost with the worker before
    loop_.OnDetached(attachment);
    while (loop_.serving()) {
      std::this_thread::yield();
    }
    Attach(attachment + 1);
  }
  for (std::thread& client : clients) {
    client.join();
  }
  CountingSink last;
  loop_.Submit(loop_.NewHandle(), Request("last", 7), &last);
  EXPECT_EQ(last.Wait(), absl::StatusCode::kOk);
  EXPECT_EQ(last.tokens(), 7);
  std::atomic<bool> drained{false};
  loop_.Drain(std::chrono::seconds(1), [&](uint32_t ended) {
    EXPECT_EQ(ended, 0u);
    drained = true;
  });
  while (!drained) {
    std::this_thread::yield();
  }
  loop_.Stop();
  EXPECT_TRUE(pipeline_.errors().empty());
}

}  // namespace
}  // namespace sluice::controller
