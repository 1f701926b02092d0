// ModelService: describes the model and plans device maps for what-if questions.
#pragma once

#include "proto/sluice/v1/model.grpc.pb.h"
#include "services/controller/controller_loop.h"

namespace sluice::controller {

class ModelService final : public v1::ModelService::CallbackService {
 public:
  // `loop` must outlive the service.
  explicit ModelService(ControllerLoop* loop) : loop_(loop) {}

  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const v1::ListModelsRequest* request,
                                       v1::ListModelsResponse* response) override;
  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context,
                                     const v1::GetModelRequest* request,
                                     v1::GetModelResponse* response) override;
  grpc::ServerUnaryReactor* PlanDeviceMap(grpc::CallbackServerContext* context,
                                          const v1::PlanDeviceMapRequest* request,
                                          v1::PlanDeviceMapResponse* response) override;

 private:
  ControllerLoop* const loop_;
};

}  // namespace sluice::controller
