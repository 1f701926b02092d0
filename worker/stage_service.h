// StageService: the gRPC shell of a stage. Reads the streams Step, Link and Ring, checks every
// frame and puts whole steps into the queue of the epoch's StepLoop. One thread a stream.
#pragma once

#include <grpcpp/server_context.h>

#include <condition_variable>
#include <mutex>
#include <set>

#include "absl/status/status.h"
#include "proto/sluice/internal/v1/stage.grpc.pb.h"
#include "worker/step_assembler.h"
#include "worker/step_loop.h"

namespace sluice::worker {

// Thread-safe.
class StageService final : public internal::v1::Stage::Service {
 public:
  // The epoch that takes steps.
  struct Session {
    uint32_t stage = 0;
    uint32_t stages = 1;
    StepFormat format;         // Of hidden states; has_hidden is set by the kind of stream
    StepLoop* loop = nullptr;  // Must live until Close()
  };

  // Promises to refuse every lower epoch. INVALID: FAILED_PRECONDITION when a higher or equal one
  // was promised before.
  absl::Status Promise(uint64_t epoch);
  uint64_t promised() const;

  // Takes steps of the promised epoch from now on. REQUIRES: no session is open.
  void Open(const Session& session);
  // Ends the session's streams and returns when no thread uses its loop any more. REQUIRES: the
  // loop is stopped, or will be without this thread. Nothing to do when none is open.
  void Close();

 private:
  // One stream's hold on the session; taken when its first frame names the epoch.
  class Hold;

  grpc::Status Step(grpc::ServerContext* context,
                    grpc::ServerReaderWriter<internal::v1::StepResponse, internal::v1::StepRequest>*
                        stream) override;
  grpc::Status Link(grpc::ServerContext* context,
                    grpc::ServerReaderWriter<internal::v1::LinkResponse, internal::v1::LinkRequest>*
                        stream) override;
  grpc::Status Ring(grpc::ServerContext* context,
                    grpc::ServerReaderWriter<internal::v1::RingResponse, internal::v1::RingRequest>*
                        stream) override;

  // FAILED_PRECONDITION unless `epoch` is the one that takes steps.
  absl::Status CheckEpoch(uint64_t epoch) const;  // Called with the lock held
  template <typename Response, typename Stream, typename Request>
  absl::Status TakeSteps(grpc::ServerContext* context, Stream* stream, Request* request,
                         bool is_link);

  mutable std::mutex mutex_;  // Guards all below
  std::condition_variable left_;
  uint64_t promised_ = 0;
  bool open_ = false;
  Session session_;
  std::set<grpc::ServerContext*> holders_;
};

}  // namespace sluice::worker
