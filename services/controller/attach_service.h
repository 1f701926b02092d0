// AttachService: the gRPC shell of sluice.internal.v1.Controller: the control stream of each
// worker, and the token frames of the last stage. Synchronous streams, a thread each: there are
// few, and frames must not wait for other work.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "proto/sluice/internal/v1/controller.grpc.pb.h"
#include "services/controller/worker_registry.h"

namespace sluice::controller {

// What the workers say. Called on gRPC's threads.
class WorkerListener {
 public:
  virtual ~WorkerListener() = default;
  // Waits for the verdict.
  virtual absl::Status OnHello(uint64_t attachment, const internal::v1::WorkerHello& hello,
                               std::shared_ptr<OrderChannel> channel) = 0;
  virtual void OnWorkerEvent(uint64_t attachment, internal::v1::AttachRequest event) = 0;
  virtual void OnDetached(uint64_t attachment) = 0;
  virtual uint64_t current_epoch() const = 0;
  virtual void OnFrame(internal::v1::TokenFrame frame) = 0;
  virtual void OnTokensBroken(uint64_t epoch) = 0;
};

class AttachService final : public internal::v1::Controller::Service {
 public:
  // `listener` must outlive the server.
  explicit AttachService(WorkerListener* listener) : listener_(listener) {}

  grpc::Status Attach(grpc::ServerContext* context,
                      grpc::ServerReaderWriter<internal::v1::AttachResponse,
                                               internal::v1::AttachRequest>* stream) override;
  grpc::Status Tokens(grpc::ServerContext* context,
                      grpc::ServerReaderWriter<internal::v1::TokensResponse,
                                               internal::v1::TokensRequest>* stream) override;

 private:
  WorkerListener* const listener_;
  std::atomic<uint64_t> next_attachment_{1};
};

}  // namespace sluice::controller
