// Reactors of Generate and StreamGenerate: where the messages of a request meet gRPC. Each deletes
// itself when both gRPC and whoever launched the request are done with it.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <atomic>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "proto/sluice/v1/generation.pb.h"
#include "services/controller/client_calls.h"
#include "services/controller/live_request.h"

namespace sluice::controller {

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

class UnaryReactor final : public grpc::ServerUnaryReactor, public ResponseSink, public ClientCall {
 public:
  // `response` belongs to gRPC and lives until OnDone.
  UnaryReactor(ClientCalls* calls, grpc::CallbackServerContext* context,
               rpc::PeerLimits::Ticket ticket, grpc::ByteBuffer* response)
      : ClientCall(calls, context, std::move(ticket)), response_(response) {}
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
  void OnDone() override;
  void OnCancel() override { cancel_hook_.Fire(); }

 private:
  v1::GenerateResponse Whole();

  grpc::ByteBuffer* const response_;
  CancelHook cancel_hook_;
  TwoUsers users_;
  std::string model_;
  std::string request_id_;
  std::vector<v1::StreamGenerateResponse> answers_;
};

// One Write is in flight at a time; what comes meanwhile is merged into one message for each
// answer. So the memory of a slow reader is bounded by its own answer.
class StreamReactor final : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                            public ResponseSink,
                            public ClientCall {
 public:
  StreamReactor(ClientCalls* calls, grpc::CallbackServerContext* context,
                rpc::PeerLimits::Ticket ticket)
      : ClientCall(calls, context, std::move(ticket)) {}
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

 private:
  // Takes the next message to write into current_. Called with the lock held.
  bool TakeNext();

  CancelHook cancel_hook_;
  TwoUsers users_;
  grpc::ByteBuffer current_;  // Of the write in flight

  std::mutex mutex_;                                 // Guards what follows
  std::vector<v1::StreamGenerateResponse> pending_;  // One an answer, in the order they came
  bool writing_ = false;
  bool broken_ = false;
  bool finished_ = false;
  std::optional<absl::Status> status_;  // From the sink: finish after the last write
};

// Ends a stream that was not admitted.
class RefusedStream final : public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  explicit RefusedStream(const grpc::Status& status) { Finish(status); }
  void OnDone() override { delete this; }
};

}  // namespace sluice::controller
