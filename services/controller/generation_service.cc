#include "services/controller/generation_service.h"

#include <algorithm>
#include <string>
#include <utility>

#include "services/controller/request_validation.h"
#include "services/rpc/error_details.h"

namespace sluice::controller {
namespace {

constexpr int64_t kRetryMs = 1000;
constexpr int kMaxDetokenizeIds = 1000000;
constexpr size_t kLongPromptBytes = 32 * 1024;  // About 1 ms of tokenizing
constexpr int kChatOfGenerate = 4;              // Numbers of the fields chat_messages
constexpr int kChatOfTokenize = 3;

absl::Status NotServing(const std::string& message) {
  absl::Status status = absl::UnavailableError(message);
  rpc::AttachErrorInfo("NOT_SERVING", {}, &status);
  rpc::AttachRetryInfo(kRetryMs, &status);
  return status;
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

absl::StatusOr<GenerationRequest> GenerationService::Prepare(grpc::CallbackServerContext* context,
                                                             const grpc::ByteBuffer& bytes) {
  const auto arrival = std::chrono::steady_clock::now();
  const auto left = context->deadline() - std::chrono::system_clock::now();
  if (left <= std::chrono::nanoseconds(0)) {
    return absl::DeadlineExceededError("the deadline had passed when the request came");
  }
  const std::shared_ptr<const ServedModel> model = loop_->model();
  if (model == nullptr || loop_->max_model_len() == 0) {
    return NotServing("the model is still being loaded");
  }
  v1::GenerateRequest request;  // Of StreamGenerate too: same fields under the same numbers
  if (absl::Status status = ParseRequest(bytes, kChatOfGenerate, &request); !status.ok()) {
    return status;
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
void GenerationService::Launch(grpc::CallbackServerContext* context, const grpc::ByteBuffer& bytes,
                               Reactor* reactor) {
  auto launch = [this, context, reactor, bytes] {
    auto prepared = context->IsCancelled() ? absl::CancelledError("the client has gone")
                                           : Prepare(context, bytes);
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
  if (bytes.Length() > kLongPromptBytes) {
    long_prompts_.Post(std::move(launch));
  } else {
    launch();
  }
}

grpc::ServerUnaryReactor* GenerationService::Generate(grpc::CallbackServerContext* context,
                                                      const grpc::ByteBuffer* request,
                                                      grpc::ByteBuffer* response) {
  auto ticket = calls_->Admit(*context, *request);
  if (!ticket.ok()) {
    loop_->metrics().Refused(ticket.status());
    return Refuse(context, ticket.status());
  }
  auto* reactor = new UnaryReactor(calls_, context, *std::move(ticket), response);
  Launch(context, *request, reactor);
  return reactor;
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* GenerationService::StreamGenerate(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  auto ticket = calls_->Admit(*context, *request);
  if (!ticket.ok()) {
    loop_->metrics().Refused(ticket.status());
    return new RefusedStream(FinishStatus(context, ticket.status()));
  }
  auto* reactor = new StreamReactor(calls_, context, *std::move(ticket));
  Launch(context, *request, reactor);
  return reactor;
}

void GenerationService::Tokens(const v1::TokenizeRequest& request, ReplyReactor* reactor) {
  v1::TokenizeResponse response;
  const std::shared_ptr<const ServedModel> model = loop_->model();
  if (model == nullptr) {
    reactor->Reply(NotServing("the loader has not described the model yet"), response);
    return;
  }
  const uint32_t served = loop_->max_model_len();
  const uint32_t max_model_len =
      served > 0 ? served : model->shards.config().max_position_embeddings();
  const absl::Status status = FillTokens(request, *model, max_model_len, &response);
  reactor->Reply(status, response);
}

grpc::ServerUnaryReactor* GenerationService::Tokenize(grpc::CallbackServerContext* context,
                                                      const grpc::ByteBuffer* request,
                                                      grpc::ByteBuffer* response) {
  return HandleUnary<v1::TokenizeRequest>(
      calls_, context, *request, response, kChatOfTokenize,
      [this](const v1::TokenizeRequest& parsed, ReplyReactor* reactor) {
        if (parsed.ByteSizeLong() > kLongPromptBytes) {
          long_prompts_.Post([this, parsed, reactor] { Tokens(parsed, reactor); });
        } else {
          Tokens(parsed, reactor);
        }
      });
}

grpc::ServerUnaryReactor* GenerationService::Detokenize(grpc::CallbackServerContext* context,
                                                        const grpc::ByteBuffer* request,
                                                        grpc::ByteBuffer* response) {
  return HandleUnary<v1::DetokenizeRequest>(
      calls_, context, *request, response, 0,
      [this](const v1::DetokenizeRequest& parsed, ReplyReactor* reactor) {
        v1::DetokenizeResponse text;
        const std::shared_ptr<const ServedModel> model = loop_->model();
        const absl::Status status = model == nullptr
                                        ? NotServing("the loader has not described the model yet")
                                        : FillText(parsed, *model, &text);
        reactor->Reply(status, text);
      });
}

grpc::ServerUnaryReactor* GenerationService::CancelRequest(grpc::CallbackServerContext* context,
                                                           const grpc::ByteBuffer* request,
                                                           grpc::ByteBuffer* response) {
  return HandleUnary<v1::CancelRequestRequest>(
      calls_, context, *request, response, 0,
      [this](const v1::CancelRequestRequest& parsed, ReplyReactor* reactor) {
        const std::string request_id = parsed.request_id();
        if (absl::Status status = CheckRequestId(request_id); !status.ok()) {
          reactor->Reply(status, v1::CancelRequestResponse());
          return;
        }
        loop_->CancelById(request_id, [reactor, request_id](bool found) {
          absl::Status status;
          if (!found) {
            status = absl::NotFoundError("request_id: no live request has this id");
            rpc::AttachResourceInfo("request", request_id, &status);
          }
          reactor->Reply(status, v1::CancelRequestResponse());
        });
      });
}

}  // namespace sluice::controller
