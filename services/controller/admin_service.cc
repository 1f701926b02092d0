#include "services/controller/admin_service.h"

#include <chrono>
#include <utility>

#include "services/rpc/error_details.h"
#include "services/rpc/grpc_status.h"

namespace sluice::controller {
namespace {

constexpr uint32_t kDefaultDrainMs = 30000;
constexpr uint32_t kLongestDrainMs = 3600000;

}  // namespace

grpc::ServerUnaryReactor* AdminService::GetCluster(grpc::CallbackServerContext* context,
                                                   const v1::GetClusterRequest* request,
                                                   v1::GetClusterResponse* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  loop_->GetCluster([reactor, response](v1::GetClusterResponse cluster) {
    *response = std::move(cluster);
    reactor->Finish(grpc::Status::OK);
  });
  return reactor;
}

grpc::ServerUnaryReactor* AdminService::GetDeviceMap(grpc::CallbackServerContext* context,
                                                     const v1::GetDeviceMapRequest* request,
                                                     v1::GetDeviceMapResponse* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  loop_->GetDeviceMap([reactor, response](std::optional<v1::DeviceMap> map, std::string text) {
    if (!map.has_value()) {
      reactor->Finish(rpc::ToGrpcStatus(
          absl::FailedPreconditionError("there is no plan now; GetCluster says what is awaited")));
      return;
    }
    *response->mutable_device_map() = *std::move(map);
    response->set_text(std::move(text));
    reactor->Finish(grpc::Status::OK);
  });
  return reactor;
}

grpc::ServerUnaryReactor* AdminService::Drain(grpc::CallbackServerContext* context,
                                              const v1::DrainRequest* request,
                                              v1::DrainResponse* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const uint32_t timeout_ms = request->has_timeout_ms() ? request->timeout_ms() : kDefaultDrainMs;
  if (timeout_ms > kLongestDrainMs) {
    reactor->Finish(
        rpc::ToGrpcStatus(rpc::FieldError("timeout_ms", "must be at most 3600000 (an hour)")));
    return reactor;
  }
  loop_->Drain(std::chrono::milliseconds(timeout_ms), [reactor, response](uint32_t ended) {
    response->set_ended_requests(ended);
    reactor->Finish(grpc::Status::OK);
  });
  return reactor;
}

}  // namespace sluice::controller
