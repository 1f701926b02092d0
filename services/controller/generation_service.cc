#include "services/controller/generation_service.h"

#include <algorithm>
#include <string>
#include <utility>

#include "services/controller/request_validation.h"
#include "services/rpc/error_details.h"
#include "services/rpc/grpc_status.h"
#include "services/rpc/log.h"

namespace sluice::controller {
namespace {

constexpr int64_t kRetryMs = 1000;
constexpr int kMaxDetokenizeIds = 1000000;
constexpr size_t kLongPromptBytes = 32 * 1024;  // About 1 ms of tokenizing
constexpr std::chrono::seconds kWatchEvery{1};

absl::Status NotServing(const std::string& message) {
  absl::Status status = absl::UnavailableError(message);
  rpc::AttachErrorInfo("NOT_SERVING", {}, &status);
  rpc::AttachRetryInfo(kRetryMs, &status);
  return status;
}

grpc::ServerUnaryReactor* FinishNow(grpc::CallbackServerContext* context,
                                    const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(FinishStatus(context, status));
  return reactor;
}

absl::Status FillTokens(const v1::TokenizeRequest& request, const ServedModel& model,
                        uint32_t max_model_len, v1::TokenizeResponse* response) {
  v1::GenerateRequest as_generate;
  as_generate.set_model(request.model());
  if (request.has_text()) {
    as_generate.set_text(request.text());
  } else if (request.has_chat_messages()) {
    *as_generate.mutable_chat_messages() = request.chat_messages();
  }
  if (request.has_add_special_tokens()) {
    as_generate.set_add_special_tokens(request.add_special_tokens());
  }
  if (absl::Status status = ValidateRequest(as_generate, model, max_model_len); !status.ok()) {
    return status;
  }
  auto prompt = MakePrompt(as_generate, model);
  if (!prompt.ok()) {
    return prompt.status();
  }
  response->set_max_model_len(max_model_len);
  for (const uint32_t id : prompt->ids) {
    response->add_token_ids(id);
    response->add_tokens(model.tokenizer->TokenText(id));
  }
  return absl::OkStatus();
}

absl::Status FillText(const v1::DetokenizeRequest& request, const ServedModel& model,
                      v1::DetokenizeResponse* response) {
  if (absl::Status status = CheckModelName(request.model(), model); !status.ok()) {
    return status;
  }
  if (request.token_ids_size() > kMaxDetokenizeIds) {
    return rpc::FieldError("token_ids", "must be at most 1000000 ids");
  }
  const std::vector<uint32_t> ids(request.token_ids().begin(), request.token_ids().end());
  auto text = model.tokenizer->Decode(ids, request.skip_special_tokens());
  if (!text.ok()) {
    return rpc::FieldError("token_ids", std::string(text.status().message()));
  }
  response->set_text(*std::move(text));
  return absl::OkStatus();
}

}  // namespace

GenerationService::GenerationService(const GenerationOptions& options, ControllerLoop* loop)
    : options_(options), loop_(loop), watcher_([this] { WatchStreams(); }) {}

GenerationService::~GenerationService() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  watcher_.join();
}

absl::StatusOr<GenerationRequest> GenerationService::Prepare(grpc::CallbackServerContext* context,
                                                             const v1::GenerateRequest& request) {
  const auto arrival = std::chrono::steady_clock::now();
  const auto left = context->deadline() - std::chrono::system_clock::now();
  if (left <= std::chrono::nanoseconds(0)) {
    return absl::DeadlineExceededError("the deadline had passed when the request came");
  }
  const std::shared_ptr<const ServedModel> model = loop_->model();
  if (model == nullptr || loop_->max_model_len() == 0) {
    return NotServing("the model is still being loaded");
  }
  auto prepared = PrepareRequest(request, *model, loop_->max_model_len());
  if (prepared.ok()) {
    prepared->arrival = arrival;
    prepared->spec.deadline =
        arrival + std::min<std::chrono::nanoseconds>(left, options_.longest_request);
  }
  return prepared;
}

template <typename Reactor>
void GenerationService::Launch(grpc::CallbackServerContext* context, v1::GenerateRequest request,
                               Reactor* reactor) {
  const bool is_long = request.ByteSizeLong() > kLongPromptBytes;
  auto launch = [this, context, reactor, request = std::move(request)] {
    auto prepared = Prepare(context, request);
    if (prepared.ok()) {
      reactor->Begin(loop_->model()->name, prepared->spec.n);
      const uint64_t handle = loop_->NewHandle();
      loop_->Submit(handle, *std::move(prepared), reactor);
      // After Submit: the loop must not hear of the end before the beginning.
      reactor->cancel_hook().Set([loop = loop_, handle] { loop->Drop(handle); });
    } else {
      loop_->metrics().Refused(prepared.status());
      reactor->OnEnd(prepared.status());
    }
    reactor->Release();
  };
  if (is_long) {
    long_prompts_.Post(std::move(launch));
  } else {
    launch();
  }
}

grpc::ServerUnaryReactor* GenerationService::Generate(grpc::CallbackServerContext* context,
                                                      const v1::GenerateRequest* request,
                                                      v1::GenerateResponse* response) {
  auto* reactor = new UnaryReactor(context, response);
  Launch(context, *request, reactor);
  return reactor;
}

grpc::ServerWriteReactor<v1::StreamGenerateResponse>* GenerationService::StreamGenerate(
    grpc::CallbackServerContext* context, const v1::StreamGenerateRequest* request) {
  auto* reactor = new StreamReactor(context, [this](StreamReactor* gone) {
    std::lock_guard<std::mutex> lock(mutex_);
    streams_.erase(gone);
  });
  {
    std::lock_guard<std::mutex> lock(mutex_);
    streams_.insert(reactor);
  }
  v1::GenerateRequest same;  // Same fields under the same numbers
  if (!same.ParseFromString(request->SerializeAsString())) {
    reactor->OnEnd(absl::InternalError("StreamGenerateRequest is not GenerateRequest"));
    reactor->Release();
    return reactor;
  }
  Launch(context, std::move(same), reactor);
  return reactor;
}

grpc::ServerUnaryReactor* GenerationService::Tokenize(grpc::CallbackServerContext* context,
                                                      const v1::TokenizeRequest* request,
                                                      v1::TokenizeResponse* response) {
  const std::shared_ptr<const ServedModel> model = loop_->model();
  if (model == nullptr) {
    return FinishNow(context, NotServing("the loader has not described the model yet"));
  }
  const uint32_t served = loop_->max_model_len();
  const uint32_t max_model_len =
      served > 0 ? served : model->shards.config().max_position_embeddings();
  return FinishNow(context, FillTokens(*request, *model, max_model_len, response));
}

grpc::ServerUnaryReactor* GenerationService::Detokenize(grpc::CallbackServerContext* context,
                                                        const v1::DetokenizeRequest* request,
                                                        v1::DetokenizeResponse* response) {
  const std::shared_ptr<const ServedModel> model = loop_->model();
  if (model == nullptr) {
    return FinishNow(context, NotServing("the loader has not described the model yet"));
  }
  return FinishNow(context, FillText(*request, *model, response));
}

grpc::ServerUnaryReactor* GenerationService::CancelRequest(grpc::CallbackServerContext* context,
                                                           const v1::CancelRequestRequest* request,
                                                           v1::CancelRequestResponse* response) {
  if (request->request_id().empty()) {
    return FinishNow(context, rpc::FieldError("request_id", "must not be empty"));
  }
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const std::string request_id = request->request_id().substr(0, 128);
  loop_->CancelById(request_id, [context, reactor, request_id](bool found) {
    absl::Status status;
    if (!found) {
      status = absl::NotFoundError("request_id: no live request has this id");
      rpc::AttachResourceInfo("request", request_id, &status);
    }
    reactor->Finish(FinishStatus(context, status));
  });
  return reactor;
}

void GenerationService::WatchStreams() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!wake_.wait_for(lock, kWatchEvery, [this] { return stop_; })) {
    const TimePoint before = std::chrono::steady_clock::now() - options_.stalled_write;
    for (StreamReactor* stream : streams_) {
      stream->CancelIfStalled(before);
    }
  }
}

}  // namespace sluice::controller
