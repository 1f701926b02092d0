// SendingStream<Response>: a server stream that a thread of its own fills, one message in flight at
// a time.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "absl/status/statusor.h"
#include "kernels/core/fault_point.h"
#include "services/rpc/grpc_status.h"

namespace sluice::loader {

// Deletes itself when gRPC is done with it.
template <typename Response>
class SendingStream : public grpc::ServerWriteReactor<Response> {
 public:
  // Fills in the next message: true; false at the end; or the error that ends the call.
  using Source = std::function<absl::StatusOr<bool>(Response*)>;

  // The call is ended with RESOURCE_EXHAUSTED when `streams` would pass `limit`. `stop` is called
  // when the client has gone, on another thread than `next`.
  SendingStream(grpc::CallbackServerContext* context, std::atomic<int>* streams, int limit,
                Source next, std::function<void()> stop)
      : context_(context), streams_(streams), next_(std::move(next)), stop_(std::move(stop)) {
    const bool admitted = streams_->fetch_add(1) < limit;
    std::lock_guard<std::mutex> lock(mutex_);  // OnDone waits until thread_ is set.
    thread_ = std::thread([this, admitted] { Run(admitted); });
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard<std::mutex> lock(mutex_);
    writing_ = false;
    broken_ |= !ok;
    changed_.notify_all();
  }

  void OnCancel() override {
    stop_();
    std::lock_guard<std::mutex> lock(mutex_);
    broken_ = true;
    changed_.notify_all();
  }

  void OnDone() override {
    { std::lock_guard<std::mutex> lock(mutex_); }
    thread_.join();
    streams_->fetch_sub(1);
    delete this;
  }

 private:
  static constexpr std::chrono::seconds kWriteTimeout{60};

  void Run(bool admitted) {
    absl::Status status = admitted ? SendAll()
                                   : absl::ResourceExhaustedError(
                                         "the loader serves as many streams as it may; try later");
    SLUICE_FAULT_POINT("loader.before_stream_end");
    this->Finish(rpc::ToGrpcStatus(status));
  }

  absl::Status SendAll() {
    for (;;) {
      absl::StatusOr<bool> more = next_(&response_);
      if (!more.ok()) return more.status();
      if (!*more) return absl::OkStatus();
      std::unique_lock<std::mutex> lock(mutex_);
      if (broken_) return absl::CancelledError("the client has gone");
      writing_ = true;
      lock.unlock();
      this->StartWrite(&response_);
      lock.lock();
      if (!changed_.wait_for(lock, kWriteTimeout, [this] { return !writing_; })) {
        context_->TryCancel();
        changed_.wait(lock, [this] { return !writing_; });  // gRPC fails the write soon.
        return absl::DeadlineExceededError("the client has taken nothing for 60 s");
      }
    }
  }

  grpc::CallbackServerContext* const context_;
  std::atomic<int>* const streams_;
  const Source next_;
  const std::function<void()> stop_;
  Response response_;  // Owned by the thread, by gRPC while writing_.
  std::mutex mutex_;   // Guards writing_, broken_ and the making of thread_.
  std::condition_variable changed_;
  bool writing_ = false;
  bool broken_ = false;
  std::thread thread_;
};

}  // namespace sluice::loader
