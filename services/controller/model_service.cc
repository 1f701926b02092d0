#include "services/controller/model_service.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "services/controller/device_map_view.h"
#include "services/controller/request_validation.h"
#include "services/rpc/error_details.h"

namespace sluice::controller {
namespace {

constexpr int64_t kRetryMs = 1000;
constexpr size_t kMaxMapEntries = 10000;

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

// What the request says, else what the workers have.
plan::MaxMemory LimitsOf(const v1::PlanDeviceMapRequest& request, const plan::MaxMemory& workers) {
  return request.max_memory().empty()
             ? workers
             : plan::MaxMemory(request.max_memory().begin(), request.max_memory().end());
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
                                                   const grpc::ByteBuffer* request,
                                                   grpc::ByteBuffer* response) {
  return HandleUnary<v1::ListModelsRequest>(
      calls_, context, *request, response, 0,
      [this](const v1::ListModelsRequest& parsed, ReplyReactor* reactor) {
        v1::ListModelsResponse list;
        if (const auto model = loop_->model()) {
          *list.add_models() = ToModel(*model, loop_->model_state(), loop_->max_model_len());
        }
        reactor->Reply(absl::OkStatus(), list);
      });
}

absl::Status ModelService::Describe(const std::string& name, v1::GetModelResponse* response) const {
  if (name.empty()) {
    return rpc::FieldError("name", "must not be empty");
  }
  const auto model = loop_->model();
  if (model == nullptr) {
    absl::Status status = absl::NotFoundError("name: no model has been described yet");
    rpc::AttachResourceInfo("model", "", &status);
    return status;
  }
  if (absl::Status status = CheckModelName(name, *model); !status.ok()) {
    return status;
  }
  *response->mutable_model() = ToModel(*model, loop_->model_state(), loop_->max_model_len());
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* ModelService::GetModel(grpc::CallbackServerContext* context,
                                                 const grpc::ByteBuffer* request,
                                                 grpc::ByteBuffer* response) {
  return HandleUnary<v1::GetModelRequest>(
      calls_, context, *request, response, 0,
      [this](const v1::GetModelRequest& parsed, ReplyReactor* reactor) {
        v1::GetModelResponse described;
        const absl::Status status = Describe(parsed.name(), &described);
        reactor->Reply(status, described);
      });
}

void ModelService::Plan(const v1::PlanDeviceMapRequest& request, ReplyReactor* reactor) {
  const auto model = loop_->model();
  absl::Status status = model == nullptr ? NotDescribed() : CheckModelName(request.model(), *model);
  if (status.ok()) {
    status = CheckRequest(request);
  }
  if (!status.ok()) {
    reactor->Reply(status, v1::PlanDeviceMapResponse());
    return;
  }
  loop_->GetPlanning(
      [this, reactor, model, request](const plan::MaxMemory& limits, plan::PlanOptions options) {
        options = ToOptions(request, std::move(options));
        planning_.Post([reactor, model, request, limits, options] {
          v1::PlanDeviceMapResponse response;
          auto planned = plan::PlanDeviceMap(model->shards, LimitsOf(request, limits), options);
          if (planned.ok()) {
            *response.mutable_device_map() = ToDeviceMap(*planned, options.block_size);
            response.set_text(plan::ToText(*planned));
          }
          reactor->Reply(planned.status(), response);
        });
      });
}

grpc::ServerUnaryReactor* ModelService::PlanDeviceMap(grpc::CallbackServerContext* context,
                                                      const grpc::ByteBuffer* request,
                                                      grpc::ByteBuffer* response) {
  return HandleUnary<v1::PlanDeviceMapRequest>(
      calls_, context, *request, response, 0,
      [this](const v1::PlanDeviceMapRequest& parsed, ReplyReactor* reactor) {
        Plan(parsed, reactor);
      });
}

}  // namespace sluice::controller
