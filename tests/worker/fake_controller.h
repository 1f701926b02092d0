// A Controller service for tests: keeps the streams of workers, lets the test give orders and wait
// for events and tokens.
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "proto/sluice/internal/v1/controller.grpc.pb.h"

namespace sluice::worker {

// Thread-safe. Waiting functions end when what they wait for happens; a test that waits in vain
// runs into CTest's limit.
class FakeController final : public internal::v1::Controller::Service {
 public:
  using Predicate = std::function<bool(const internal::v1::AttachRequest&)>;

  // The next event of `worker_id` that fits; those before it, and statistics, are dropped.
  internal::v1::AttachRequest WaitForEvent(const std::string& worker_id, const Predicate& fits) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      auto& events = events_[worker_id];
      while (!events.empty()) {
        internal::v1::AttachRequest event = std::move(events.front());
        events.erase(events.begin());
        if (fits(event)) {
          return event;
        }
      }
      changed_.wait(lock);
    }
  }
  internal::v1::WorkerHello WaitForHello(const std::string& worker_id) {
    return WaitForEvent(worker_id, [](const auto& event) { return event.has_hello(); }).hello();
  }
  internal::v1::WorkerReady WaitForReady(const std::string& worker_id) {
    return WaitForEvent(worker_id, [](const auto& event) { return event.has_ready(); }).ready();
  }
  internal::v1::WorkerFault WaitForFault(const std::string& worker_id) {
    return WaitForEvent(worker_id, [](const auto& event) { return event.has_fault(); }).fault();
  }

  void Order(const std::string& worker_id, const internal::v1::AttachResponse& order) {
    std::lock_guard<std::mutex> lock(mutex_);
    streams_.at(worker_id)->Write(order);
  }

  internal::v1::TokenFrame WaitForTokens(uint64_t step) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return frames_.count(step) > 0; });
    return frames_[step];
  }
  void ForgetTokens() {
    std::lock_guard<std::mutex> lock(mutex_);
    frames_.clear();
  }

 private:
  using Stream =
      grpc::ServerReaderWriter<internal::v1::AttachResponse, internal::v1::AttachRequest>;

  grpc::Status Attach(grpc::ServerContext* context, Stream* stream) override {
    internal::v1::AttachRequest event;
    std::string id;
    while (stream->Read(&event)) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (event.has_hello()) {
        id = event.hello().worker_id();
        streams_[id] = stream;
      }
      if (!event.has_stats()) {
        events_[id].push_back(event);
        changed_.notify_all();
      }
    }
    std::lock_guard<std::mutex> lock(mutex_);
    if (streams_[id] == stream) {
      streams_.erase(id);
    }
    return grpc::Status::OK;
  }

  grpc::Status Tokens(grpc::ServerContext* context,
                      grpc::ServerReaderWriter<internal::v1::TokensResponse,
                                               internal::v1::TokensRequest>* stream) override {
    internal::v1::TokensRequest request;
    while (stream->Read(&request)) {
      std::lock_guard<std::mutex> lock(mutex_);
      frames_[request.frame().step()] = request.frame();
      changed_.notify_all();
    }
    return grpc::Status::OK;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, Stream*> streams_;
  std::map<std::string, std::vector<internal::v1::AttachRequest>> events_;
  std::map<uint64_t, internal::v1::TokenFrame> frames_;
};

}  // namespace sluice::worker
