// ModelService: describes the model and plans device maps for what-if questions.
#pragma once

#include "proto/sluice/v1/model.grpc.pb.h"
#include "services/controller/client_calls.h"
#include "services/controller/controller_loop.h"
#include "services/controller/task_thread.h"

namespace sluice::controller {

// Requests come as bytes, as those of GenerationService.
using RawModelService = v1::ModelService::WithRawCallbackMethod_ListModels<
    v1::ModelService::WithRawCallbackMethod_GetModel<
        v1::ModelService::WithRawCallbackMethod_PlanDeviceMap<v1::ModelService::Service>>>;

class ModelService final : public RawModelService {
 public:
  // `loop` and `calls` must outlive the service.
  ModelService(ControllerLoop* loop, ClientCalls* calls) : loop_(loop), calls_(calls) {}

  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* PlanDeviceMap(grpc::CallbackServerContext* context,
                                          const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* response) override;

 private:
  absl::Status Describe(const std::string& name, v1::GetModelResponse* response) const;
  void Plan(const v1::PlanDeviceMapRequest& request, ReplyReactor* reactor);

  ControllerLoop* const loop_;
  ClientCalls* const calls_;
  TaskThread planning_;  // A large what-if question must not hold up the loop
};

}  // namespace sluice::controller
