#include "services/controller/model_service.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "services/controller/device_map_view.h"
#include "services/controller/generate_reactors.h"
#include "services/controller/request_validation.h"
#include "services/rpc/error_details.h"

namespace sluice::controller {
namespace {

constexpr int64_t kRetryMs = 1000;
constexpr size_t kMaxMapEntries = 10000;

grpc::ServerUnaryReactor* FinishNow(grpc::CallbackServerContext* context,
                                    const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(FinishStatus(context, status));
  return reactor;
}

absl::Status NotDescribed() {
  absl::Status status = absl::UnavailableError("the loader has not described the model yet");
  rpc::AttachErrorInfo("NOT_SERVING", {}, &status);
  rpc::AttachRetryInfo(kRetryMs, &status);
  return status;
}

plan::MapMode ToMode(v1::DeviceMapMode mode) {
  switch (mode) {
    case v1::DEVICE_MAP_MODE_SEQUENTIAL:
      return plan::MapMode::kSequential;
    case v1::DEVICE_MAP_MODE_BALANCED_LOW_0:
      return plan::MapMode::kBalancedLow0;
    case v1::DEVICE_MAP_MODE_CUSTOM:
      return plan::MapMode::kCustom;
    default:
      return plan::MapMode::kAuto;
  }
}

plan::PlanOptions ToOptions(const v1::PlanDeviceMapRequest& request, plan::PlanOptions options) {
  options.mode = ToMode(request.mode());
  options.custom_json = nlohmann::json(std::map<std::string, std::string>(request.custom().begin(),
                                                                          request.custom().end()))
                            .dump();
  options.hf_compat = request.hf_compat();
  options.kv_reserve_bytes = request.kv_reserve_bytes();
  const auto take = [](bool is_set, uint32_t value, uint32_t* option) {
    if (is_set) {
      *option = value;
    }
  };
  take(request.has_max_model_len(), request.max_model_len(), &options.max_model_len);
  take(request.has_max_batch_size(), request.max_batch_size(), &options.max_batch_size);
  take(request.has_max_batch_tokens(), request.max_batch_tokens(), &options.max_batch_tokens);
  take(request.has_block_size(), request.block_size(), &options.block_size);
  return options;
}

absl::Status CheckRequest(const v1::PlanDeviceMapRequest& request) {
  if (request.max_memory().size() > 1024) {
    return rpc::FieldError("max_memory", "must name at most 1024 devices");
  }
  if (request.custom().size() > kMaxMapEntries) {
    return rpc::FieldError("custom", "must name at most 10000 modules");
  }
  if (request.has_block_size() && (request.block_size() < 1 || request.block_size() > 1024)) {
    return rpc::FieldError("block_size", "must be 1 to 1024");
  }
  if (request.has_max_batch_size() &&
      (request.max_batch_size() < 1 || request.max_batch_size() > 4096)) {
    return rpc::FieldError("max_batch_size", "must be 1 to 4096");
  }
  if (request.has_max_batch_tokens() &&
      (request.max_batch_tokens() < 1 || request.max_batch_tokens() > 65536)) {
    return rpc::FieldError("max_batch_tokens", "must be 1 to 65536");
  }
  return absl::OkStatus();
}

}  // namespace

grpc::ServerUnaryReactor* ModelService::ListModels(grpc::CallbackServerContext* context,
                                                   const v1::ListModelsRequest* request,
                                                   v1::ListModelsResponse* response) {
  if (const auto model = loop_->model()) {
    *response->add_models() = ToModel(*model, loop_->model_state(), loop_->max_model_len());
  }
  return FinishNow(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* ModelService::GetModel(grpc::CallbackServerContext* context,
                                                 const v1::GetModelRequest* request,
                                                 v1::GetModelResponse* response) {
  if (request->name().empty()) {
    return FinishNow(context, rpc::FieldError("name", "must not be empty"));
  }
  const auto model = loop_->model();
  if (model == nullptr) {
    absl::Status status = absl::NotFoundError("name: no model has been described yet");
    rpc::AttachResourceInfo("model", request->name().substr(0, 64), &status);
    return FinishNow(context, status);
  }
  if (absl::Status status = CheckModelName(request->name(), *model); !status.ok()) {
    return FinishNow(context, status);
  }
  *response->mutable_model() = ToModel(*model, loop_->model_state(), loop_->max_model_len());
  return FinishNow(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* ModelService::PlanDeviceMap(grpc::CallbackServerContext* context,
                                                      const v1::PlanDeviceMapRequest* request,
                                                      v1::PlanDeviceMapResponse* response) {
  const auto model = loop_->model();
  if (model == nullptr) {
    return FinishNow(context, NotDescribed());
  }
  if (absl::Status status = CheckModelName(request->model(), *model); !status.ok()) {
    return FinishNow(context, status);
  }
  if (absl::Status status = CheckRequest(*request); !status.ok()) {
    return FinishNow(context, status);
  }
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  loop_->GetPlanning([context, reactor, model, request = *request, response](
                         plan::MaxMemory limits, plan::PlanOptions options) {
    if (!request.max_memory().empty()) {
      limits = plan::MaxMemory(request.max_memory().begin(), request.max_memory().end());
    }
    options = ToOptions(request, std::move(options));
    auto planned = plan::PlanDeviceMap(model->shards, limits, options);
    if (planned.ok()) {
      *response->mutable_device_map() = ToDeviceMap(*planned, options.block_size);
      response->set_text(plan::ToText(*planned));
    }
    reactor->Finish(FinishStatus(context, planned.status()));
  });
  return reactor;
}

}  // namespace sluice::controller
