// GenerationService: validate, tokenize, hand to the loop; the reactors stream back what comes. No
// state.
#pragma once

#include <chrono>

#include "proto/sluice/v1/generation.grpc.pb.h"
#include "services/controller/client_calls.h"
#include "services/controller/controller_loop.h"
#include "services/controller/generate_reactors.h"
#include "services/controller/task_thread.h"

namespace sluice::controller {

struct GenerationOptions {
  std::chrono::milliseconds longest_request{
      10 * 60 * 1000};  // For requests without a deadline, and the most for others
};

// Requests come as bytes: a call is counted before its request is parsed (client_calls.h).
using RawGenerationService = v1::GenerationService::WithRawCallbackMethod_Generate<
    v1::GenerationService::WithRawCallbackMethod_StreamGenerate<
        v1::GenerationService::WithRawCallbackMethod_Tokenize<
            v1::GenerationService::WithRawCallbackMethod_Detokenize<
                v1::GenerationService::WithRawCallbackMethod_CancelRequest<
                    v1::GenerationService::Service>>>>>;

class GenerationService final : public RawGenerationService {
 public:
  // `loop` and `calls` must outlive the service.
  GenerationService(const GenerationOptions& options, ControllerLoop* loop, ClientCalls* calls)
      : options_(options), loop_(loop), calls_(calls) {}

  grpc::ServerUnaryReactor* Generate(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* StreamGenerate(
      grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* CancelRequest(grpc::CallbackServerContext* context,
                                          const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* response) override;

 private:
  absl::StatusOr<GenerationRequest> Prepare(grpc::CallbackServerContext* context,
                                            const grpc::ByteBuffer& bytes);
  // Prepares and submits, a long prompt on a thread of its own. The reactor ends by itself.
  template <typename Reactor>
  void Launch(grpc::CallbackServerContext* context, const grpc::ByteBuffer& bytes,
              Reactor* reactor);
  void Tokens(const v1::TokenizeRequest& request, ReplyReactor* reactor);

  const GenerationOptions options_;
  ControllerLoop* const loop_;
  ClientCalls* const calls_;
  TaskThread long_prompts_;
};

}  // namespace sluice::controller
