// Calls of clients: admission before any work, bytes to messages and back under caps, and the end
// of calls whose client does not take its answer. Public methods are raw (gRPC hands over bytes),
// so that a call is counted before its request is parsed.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <set>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "services/controller/sequence.h"
#include "services/rpc/peer_limits.h"

namespace sluice::controller {

// Most fields of a request, repeated ones counted each: an empty one takes 2 bytes on the wire and a
// hundred times as much once parsed.
inline constexpr uint32_t kMaxRequestFields = 20000;

// Status for the client; RetryInfo also becomes the trailer that gRPC's own retry obeys.
grpc::Status FinishStatus(grpc::CallbackServerContext* context, const absl::Status& status);

// INVALID_ARGUMENT: too many fields (those inside the field `nested` count too; 0: none), bytes
// that are no message of this kind, or a string that is not UTF-8. Never quotes them.
absl::Status ParseRequest(const grpc::ByteBuffer& bytes, int nested,
                          google::protobuf::MessageLite* request);

grpc::ByteBuffer ToBytes(const google::protobuf::MessageLite& message);

struct ClientLimits {
  rpc::PeerLimits::Limits peer;
  std::chrono::milliseconds stalled_write{30 * 1000};  // A client that takes nothing for so long
};

class ClientCalls;

// One call: its place among its peer's calls, and whether it waits for its client to read.
class ClientCall {
 public:
  ClientCall(ClientCalls* calls, grpc::CallbackServerContext* context,
             rpc::PeerLimits::Ticket ticket);
  virtual ~ClientCall() = default;

  // Ends the call when a write was begun before `before` and is not done.
  void CancelIfStalled(TimePoint before);

 protected:
  void WriteBegan() { write_began_ = std::chrono::steady_clock::now().time_since_epoch(); }
  void WriteEnded() { write_began_ = TimePoint::duration::max(); }
  // Right before Finish with `bytes` of answer: a small one counts no more, so that a client that has
  // its answer may call again at once (gRPC's OnDone comes later). A large one counts until OnDone.
  void Finishing(size_t bytes);
  // First thing in OnDone: the context goes with it, and the call counts no more.
  void Gone();

  grpc::CallbackServerContext* const context_;

 private:
  ClientCalls* const calls_;
  rpc::PeerLimits::Ticket ticket_;
  std::atomic<TimePoint::duration> write_began_{TimePoint::duration::max()};
};

class ClientCalls {
 public:
  explicit ClientCalls(const ClientLimits& limits);
  // All calls must have gone.
  ~ClientCalls();

  // Before any work for a call. RESOURCE_EXHAUSTED: as PeerLimits::Enter. CANCELLED: the client has
  // gone already, so that work is for nobody.
  absl::StatusOr<rpc::PeerLimits::Ticket> Admit(const grpc::CallbackServerContext& context,
                                                const grpc::ByteBuffer& request);

 private:
  friend class ClientCall;
  void Watch();

  const ClientLimits limits_;
  rpc::PeerLimits peers_;
  std::mutex mutex_;  // Guards calls_ and stop_
  std::condition_variable wake_;
  std::set<ClientCall*> open_;
  bool stop_ = false;
  std::thread watcher_;
};

// A unary call without a stream of events. Deletes itself.
class ReplyReactor final : public grpc::ServerUnaryReactor, public ClientCall {
 public:
  // `response` belongs to gRPC.
  ReplyReactor(ClientCalls* calls, grpc::CallbackServerContext* context,
               rpc::PeerLimits::Ticket ticket, grpc::ByteBuffer* response)
      : ClientCall(calls, context, std::move(ticket)), response_(response) {}

  // Once, from any thread. `message` counts when the status is OK.
  void Reply(const absl::Status& status, const google::protobuf::MessageLite& message);
  void OnDone() override;

 private:
  grpc::ByteBuffer* const response_;
};

// Ends a unary call that was not admitted.
grpc::ServerUnaryReactor* Refuse(grpc::CallbackServerContext* context, const absl::Status& status);

// A whole unary method: admission, parsing (`nested`: as ParseRequest), `handle(request, reactor)`,
// which must Reply.
template <typename Request, typename Handle>
grpc::ServerUnaryReactor* HandleUnary(ClientCalls* calls, grpc::CallbackServerContext* context,
                                      const grpc::ByteBuffer& bytes, grpc::ByteBuffer* response,
                                      int nested, const Handle& handle) {
  auto ticket = calls->Admit(*context, bytes);
  if (!ticket.ok()) {
    return Refuse(context, ticket.status());
  }
  auto* reactor = new ReplyReactor(calls, context, *std::move(ticket), response);
  Request request;
  if (absl::Status status = ParseRequest(bytes, nested, &request); !status.ok()) {
    reactor->Reply(status, request);
  } else {
    handle(request, reactor);
  }
  return reactor;
}

}  // namespace sluice::controller
