// Reactors of Generate and StreamGenerate: where the messages of a request meet gRPC. Each deletes
// itself when gRPC is done with it.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

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

class UnaryReactor final : public grpc::ServerUnaryReactor, public ResponseSink {
 public:
  // `on_cancel`: the client has gone. `response` belongs to gRPC and lives until OnDone.
  UnaryReactor(grpc::CallbackServerContext* context, const std::string& model, uint32_t n,
               v1::GenerateResponse* response);
  void set_on_cancel(std::function<void()> on_cancel) { on_cancel_ = std::move(on_cancel); }

  void OnMessage(v1::StreamGenerateResponse&& message) override;
  void OnEnd(const absl::Status& status) override;
  void OnDone() override { delete this; }
  void OnCancel() override { on_cancel_(); }

 private:
  void FillResponse();

  grpc::CallbackServerContext* const context_;
  v1::GenerateResponse* const response_;
  std::function<void()> on_cancel_;
  std::vector<v1::StreamGenerateResponse> answers_;
};

// One Write is in flight at a time; what comes meanwhile is merged into one message for each
// answer. So the memory of a slow reader is bounded by its own answer.
class StreamReactor final : public grpc::ServerWriteReactor<v1::StreamGenerateResponse>,
                            public ResponseSink {
 public:
  // `on_gone`: gRPC is done; called before the reactor is deleted.
  StreamReactor(grpc::CallbackServerContext* context, std::function<void(StreamReactor*)> on_gone);
  void set_on_cancel(std::function<void()> on_cancel) { on_cancel_ = std::move(on_cancel); }

  void OnMessage(v1::StreamGenerateResponse&& message) override;
  void OnEnd(const absl::Status& status) override;
  void OnWriteDone(bool ok) override;
  void OnDone() override;
  void OnCancel() override { on_cancel_(); }

  // Ends the call when the write in flight was begun before `before`: the client does not read.
  void CancelIfStalled(TimePoint before);

 private:
  // Takes the next message to write into current_. Called with the lock held.
  bool TakeNext();

  grpc::CallbackServerContext* const context_;
  const std::function<void(StreamReactor*)> on_gone_;
  std::function<void()> on_cancel_;
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
