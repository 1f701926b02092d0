// AdminService: a look into the group, and draining it. Registered on the admin listener only.
#pragma once

#include "proto/sluice/v1/admin.grpc.pb.h"
#include "services/controller/controller_loop.h"

namespace sluice::controller {

class AdminService final : public v1::AdminService::CallbackService {
 public:
  // `loop` must outlive the service.
  explicit AdminService(ControllerLoop* loop) : loop_(loop) {}

  grpc::ServerUnaryReactor* GetCluster(grpc::CallbackServerContext* context,
                                       const v1::GetClusterRequest* request,
                                       v1::GetClusterResponse* response) override;
  grpc::ServerUnaryReactor* GetDeviceMap(grpc::CallbackServerContext* context,
                                         const v1::GetDeviceMapRequest* request,
                                         v1::GetDeviceMapResponse* response) override;
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context,
                                  const v1::DrainRequest* request,
                                  v1::DrainResponse* response) override;

 private:
  ControllerLoop* const loop_;
};

}  // namespace sluice::controller
