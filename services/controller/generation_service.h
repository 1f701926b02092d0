// GenerationService: validate, tokenize, hand to the loop; the reactors stream back what comes. No
// state but the streams that are open.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <set>
#include <thread>

#include "proto/sluice/v1/generation.grpc.pb.h"
#include "services/controller/controller_loop.h"
#include "services/controller/generate_reactors.h"
#include "services/controller/task_thread.h"

namespace sluice::controller {

struct GenerationOptions {
  std::chrono::milliseconds longest_request{
      10 * 60 * 1000};  // For requests without a deadline, and the most for others
  std::chrono::milliseconds stalled_write{
      30 * 1000};  // A client that reads nothing for so long is ended
};

class GenerationService final : public v1::GenerationService::CallbackService {
 public:
  // `loop` must outlive the service.
  GenerationService(const GenerationOptions& options, ControllerLoop* loop);
  ~GenerationService() override;

  grpc::ServerUnaryReactor* Generate(grpc::CallbackServerContext* context,
                                     const v1::GenerateRequest* request,
                                     v1::GenerateResponse* response) override;
  grpc::ServerWriteReactor<v1::StreamGenerateResponse>* StreamGenerate(
      grpc::CallbackServerContext* context, const v1::StreamGenerateRequest* request) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override;
  grpc::ServerUnaryReactor* CancelRequest(grpc::CallbackServerContext* context,
                                          const v1::CancelRequestRequest* request,
                                          v1::CancelRequestResponse* response) override;

 private:
  absl::StatusOr<GenerationRequest> Prepare(grpc::CallbackServerContext* context,
                                            const v1::GenerateRequest& request);
  // Prepares and submits, a long prompt on a thread of its own. The reactor ends by itself.
  template <typename Reactor>
  void Launch(grpc::CallbackServerContext* context, v1::GenerateRequest request, Reactor* reactor);
  void WatchStreams();

  const GenerationOptions options_;
  ControllerLoop* const loop_;
  TaskThread long_prompts_;
  std::mutex mutex_;  // Guards streams_ and stop_
  std::condition_variable wake_;
  std::set<StreamReactor*> streams_;
  bool stop_ = false;
  std::thread watcher_;
};

}  // namespace sluice::controller
