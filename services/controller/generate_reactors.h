// Reactors of Generate and StreamGenerate: where the messages of a request meet gRPC. Each deletes
// itself when both gRPC and whoever launched the request are done with it.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "proto/sluice/v1/generation.pb.h"
#include "services/controller/live_request.h"

namespace sluice::controller {

// Status for the client; RetryInfo also becomes the trailer that gRPC's own retry obeys.
grpc::Status FinishStatus(grpc::CallbackServerContext* context, const absl::Status& status);

// Ends a reactor when both of its users have released it: gRPC (OnDone) and the launcher.
class TwoUsers {
 public:
  // True for the second call.
  bool Release() { return users_.fetch_sub(1) == 1; }

 private:
  std::atomic<int> users_{2};
};

// Runs a function when the client has gone, whichever comes first: the function or the news.
// Thread-safe.
class CancelHook {
 public:
  void Set(std::function<void()> function);
  void Fire();

 private:
  std::mutex mutex_;  // Guards both
  std::function<void()> function_;
  bool fired_ = false;
};

class UnaryReactor final : public grpc::ServerUnaryReactor, public ResponseSink {
 public:
  // `response` belongs to gRPC and lives until OnDone.
  UnaryReactor(grpc::CallbackServerContext* context, v1::GenerateResponse* response)
      : context_(context), response_(response) {}
  // Before the first message.
  void Begin(const std::string& model, uint32_t n);
  CancelHook& cancel_hook() { return cancel_hook_; }
  void Release() {
    if (users_.Release()) {
      delete this;
    }
  }

  void OnMessage(v1::StreamGenerateResponse&& message) override;
  void OnEnd(const absl::Status& status) override;
  void OnDone() override { Release(); }
  void OnCancel() override { cancel_hook_.Fire(); }

 private:
  void FillResponse();

  grpc::CallbackServerContext* const context_;
  v1::GenerateResponse* const response_;
  CancelHook cancel_hook_;
  TwoUsers users_;
  std::vector<v1::StreamGenerateResponse> answers_;
};

// One Write is in flight at a time; what comes meanwhile is merged into one message for each
// answer. So the memory of a slow reader is bounded by its own answer.
class StreamReactor final : public grpc::ServerWriteReactor<v1::StreamGenerateResponse>,
                            public ResponseSink {
 public:
  // `on_gone`: gRPC is done; called before the reactor is deleted.
  StreamReactor(grpc::CallbackServerContext* context, std::function<void(StreamReactor*)> on_gone);
  void Begin(const std::string& model, uint32_t n) {}
  CancelHook& cancel_hook() { return cancel_hook_; }
  void Release() {
    if (users_.Release()) {
      delete this;
    }
  }

  void OnMessage(v1::StreamGenerateResponse&& message) override;
  void OnEnd(const absl::Status& status) override;
  void OnWriteDone(bool ok) override;
  void OnDone() override;
  void OnCancel() override { cancel_hook_.Fire(); }

  // Ends the call when the write in flight was begun before `before`: the client does not read.
  void CancelIfStalled(TimePoint before);

 private:
  // Takes the next message to write into current_. Called with the lock held.
  bool TakeNext();

  grpc::CallbackServerContext* const context_;
  const std::function<void(StreamReactor*)> on_gone_;
  CancelHook cancel_hook_;
  TwoUsers users_;
  v1::StreamGenerateResponse current_;  // Of the write in flight

  std::mutex mutex_;                                 // Guards what follows
  std::vector<v1::StreamGenerateResponse> pending_;  // One an answer, in the order they came
  bool writing_ = false;
  bool broken_ = false;
  bool finished_ = false;
  TimePoint write_began_{};
  std::optional<absl::Status> status_;  // From the sink: finish after the last write
};

}  // namespace sluice::controller
