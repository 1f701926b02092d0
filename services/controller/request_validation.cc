#include "services/controller/request_validation.h"

#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "services/rpc/error_details.h"

namespace sluice::controller {
namespace {

using v1::GenerateRequest;

constexpr uint32_t kDefaultMaxTokens = 16;
constexpr uint32_t kDefaultMaxTokensChat = 256;
constexpr float kGreedyBelow = 1e-4f;

// Collects violations; the first one is the message.
class Violations {
 public:
  void Check(bool ok, const char* field, const std::string& rule) {
    if (ok) {
      return;
    }
    if (status_.ok()) {
      status_ = absl::InvalidArgumentError(absl::StrCat(field, ": ", rule));
    }
    rpc::AttachFieldViolation(field, rule, &status_);
  }

  // False for NaN.
  void CheckRange(bool is_set, float value, float low, float high, const char* field) {
    Check(!is_set || (low <= value && value <= high), field,
          absl::StrCat("must be ", low, " to ", high));
  }

  absl::Status status() const { return status_; }

 private:
  absl::Status status_;
};

void CheckNumbers(const GenerateRequest& request, uint32_t max_model_len, Violations* violations) {
  violations->CheckRange(request.has_temperature(), request.temperature(), 0, 100, "temperature");
  violations->CheckRange(request.has_min_p(), request.min_p(), 0, 1, "min_p");
  violations->CheckRange(request.has_repetition_penalty(), request.repetition_penalty(), 0.01f, 100,
                         "repetition_penalty");
  violations->CheckRange(request.has_presence_penalty(), request.presence_penalty(), -2, 2,
                         "presence_penalty");
  violations->CheckRange(request.has_frequency_penalty(), request.frequency_penalty(), -2, 2,
                         "frequency_penalty");
  violations->Check(!request.has_top_p() || (request.top_p() > 0 && request.top_p() <= 1), "top_p",
                    "must be above 0 and at most 1");
  violations->Check(request.top_k() >= -1, "top_k", "must be -1 (all), 0 (all) or more");
  const uint32_t max_tokens = request.has_max_tokens() ? request.max_tokens() : kDefaultMaxTokens;
  violations->Check(max_tokens >= 1 && (!request.has_max_tokens() || max_tokens <= max_model_len),
                    "max_tokens",
                    absl::StrCat("must be 1 to ", max_model_len, ", the longest context served"));
  violations->Check(!request.has_min_tokens() || request.min_tokens() <= max_tokens, "min_tokens",
                    "must not be above max_tokens");
  violations->Check(!request.has_n() || (request.n() >= 1 && request.n() <= kMaxAnswers), "n",
                    absl::StrCat("must be 1 to ", kMaxAnswers));
  const std::string logprobs_rule = absl::StrCat("must be 0 to ", kMaxLogprobs);
  violations->Check(request.logprobs() >= 0 && request.logprobs() <= kMaxLogprobs, "logprobs",
                    logprobs_rule);
  violations->Check(request.prompt_logprobs() >= 0 && request.prompt_logprobs() <= kMaxLogprobs,
                    "prompt_logprobs", logprobs_rule);
}

void CheckStops(const GenerateRequest& request, uint32_t vocab_size, Violations* violations) {
  violations->Check(request.stop_size() <= kMaxStops, "stop",
                    absl::StrCat("must be at most ", kMaxStops, " strings"));
  const bool lengths_ok = std::all_of(
      request.stop().begin(), request.stop().end(),
      [](const std::string& stop) { return !stop.empty() && stop.size() <= kMaxStopBytes; });
  violations->Check(lengths_ok, "stop",
                    absl::StrCat("each string must be 1 to ", kMaxStopBytes, " bytes"));
  violations->Check(request.stop_token_ids_size() <= kMaxStopTokenIds, "stop_token_ids",
                    absl::StrCat("must be at most ", kMaxStopTokenIds, " ids"));
  const bool ids_ok = std::all_of(request.stop_token_ids().begin(), request.stop_token_ids().end(),
                                  [vocab_size](uint32_t id) { return id < vocab_size; });
  violations->Check(ids_ok, "stop_token_ids",
                    absl::StrCat("each id must be below the vocabulary's size, ", vocab_size));
}

void CheckPromptShape(const GenerateRequest& request, Violations* violations) {
  const std::string too_large = absl::StrCat("must be at most ", kMaxPromptBytes, " bytes");
  switch (request.prompt_case()) {
    case GenerateRequest::kText:
      violations->Check(request.text().size() <= kMaxPromptBytes, "text", too_large);
      break;
    case GenerateRequest::kTokenIds:
      violations->Check(request.token_ids().ids_size() > 0, "token_ids.ids",
                        "must hold at least one id");
      break;
    case GenerateRequest::kChatMessages: {
      violations->Check(request.chat_messages().messages_size() > 0, "chat_messages.messages",
                        "must hold at least one message");
      size_t bytes = 0;
      bool has_roles = true;
      for (const v1::ChatMessage& message : request.chat_messages().messages()) {
        bytes += message.role().size() + message.content().size();
        has_roles = has_roles && !message.role().empty();
      }
      violations->Check(has_roles, "chat_messages.messages", "each message must have a role");
      violations->Check(bytes <= kMaxPromptBytes, "chat_messages.messages", too_large);
      break;
    }
    case GenerateRequest::PROMPT_NOT_SET:
      violations->Check(false, "prompt", "one of text, token_ids and chat_messages must be set");
      break;
  }
}

constexpr char kRequestIdRule[] = "must be at most 128 characters of [A-Za-z0-9._:-]";

bool IsRequestId(const std::string& id) {
  return id.size() <= 128 && id.find_first_not_of(
                                 "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                 "0123456789._:-") == std::string::npos;
}

uint64_t Random64() {
  thread_local std::mt19937_64 generator{std::random_device{}()};
  return generator();
}

internal::v1::SamplingParams MakeSampling(const GenerateRequest& request,
                                          const std::vector<uint32_t>& end_ids) {
  internal::v1::SamplingParams sampling;
  const float temperature = request.has_temperature() ? request.temperature() : 1.0f;
  sampling.set_temperature(temperature < kGreedyBelow ? 0.0f : temperature);
  sampling.set_top_k(request.top_k() > 0 ? static_cast<uint32_t>(request.top_k()) : 0);
  sampling.set_top_p(request.has_top_p() ? request.top_p() : 1.0f);
  sampling.set_min_p(request.min_p());
  sampling.set_repetition_penalty(request.has_repetition_penalty() ? request.repetition_penalty()
                                                                   : 1.0f);
  sampling.set_presence_penalty(request.presence_penalty());
  sampling.set_frequency_penalty(request.frequency_penalty());
  sampling.set_seed(request.has_seed() ? static_cast<uint64_t>(request.seed()) : Random64());
  sampling.set_num_logprobs(request.has_logprobs() ? request.logprobs() : -1);
  sampling.set_num_prompt_logprobs(request.has_prompt_logprobs() ? request.prompt_logprobs() : -1);
  sampling.set_min_tokens(request.min_tokens());
  if (request.min_tokens() > 0) {
    sampling.mutable_banned_until_min()->Add(end_ids.begin(), end_ids.end());
  }
  return sampling;
}

OutputSpec MakeOutput(const GenerateRequest& request) {
  OutputSpec output;
  output.stop.assign(request.stop().begin(), request.stop().end());
  output.include_stop = request.include_stop_str_in_output();
  output.skip_special_tokens = !request.has_skip_special_tokens() || request.skip_special_tokens();
  output.min_tokens = request.min_tokens();
  output.num_logprobs = request.has_logprobs() ? request.logprobs() : -1;
  return output;
}

std::vector<uint32_t> EndIds(const GenerateRequest& request, const ServedModel& model) {
  std::vector<uint32_t> ids(request.stop_token_ids().begin(), request.stop_token_ids().end());
  if (!request.ignore_eos()) {
    ids.insert(ids.end(), model.eos_ids.begin(), model.eos_ids.end());
  }
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

absl::Status PromptTooLong(size_t tokens, uint32_t max_model_len) {
  absl::Status status = absl::InvalidArgumentError(
      absl::StrCat("the prompt has ", tokens, " tokens; with at least one token of answer at most ",
                   max_model_len, " fit: shorten it"));
  rpc::AttachErrorInfo(
      "PROMPT_TOO_LONG",
      {{"prompt_tokens", absl::StrCat(tokens)}, {"max_model_len", absl::StrCat(max_model_len)}},
      &status);
  return status;
}

absl::StatusOr<Prompt> RenderChat(const GenerateRequest& request, const ServedModel& model) {
  std::vector<text::Tokenizer::ChatMessage> messages;
  for (const v1::ChatMessage& message : request.chat_messages().messages()) {
    messages.push_back({message.role(), message.content()});
  }
  const bool open_answer = !request.chat_messages().has_add_generation_prompt() ||
                           request.chat_messages().add_generation_prompt();
  auto text = model.tokenizer->ApplyChatTemplate(messages, open_answer);
  if (!text.ok()) {
    return text.status();
  }
  Prompt prompt;
  prompt.text = *std::move(text);
  // Not Encode(prompt.text): a control token spelled in a message would count.
  auto ids = model.tokenizer->EncodeChat(messages, open_answer);
  if (!ids.ok()) {
    return ids.status();
  }
  prompt.ids = *std::move(ids);
  return prompt;
}

}  // namespace

absl::Status CheckModelName(const std::string& name, const ServedModel& model) {
  if (name.empty() || name == model.name) {
    return absl::OkStatus();
  }
  absl::Status status = absl::NotFoundError(
      absl::StrCat("model: this server serves \"", model.name, "\"; ListModels lists it"));
  // A client's own words come back only when they can be a name.
  rpc::AttachResourceInfo("model", IsRequestId(name) ? name : "", &status);
  return status;
}

absl::Status CheckRequestId(const std::string& id) {
  if (id.empty()) {
    return rpc::FieldError("request_id", "must not be empty");
  }
  return IsRequestId(id) ? absl::OkStatus() : rpc::FieldError("request_id", kRequestIdRule);
}

absl::Status ValidateRequest(const GenerateRequest& request, const ServedModel& model,
                             uint32_t max_model_len) {
  if (absl::Status status = CheckModelName(request.model(), model); !status.ok()) {
    return status;
  }
  Violations violations;
  CheckPromptShape(request, &violations);
  CheckNumbers(request, max_model_len, &violations);
  CheckStops(request, model.shards.config().vocab_size(), &violations);
  violations.Check(IsRequestId(request.request_id()), "request_id", kRequestIdRule);
  return violations.status();
}

absl::StatusOr<Prompt> MakePrompt(const GenerateRequest& request, const ServedModel& model) {
  Prompt prompt;
  const uint32_t vocab_size = model.shards.config().vocab_size();
  switch (request.prompt_case()) {
    case GenerateRequest::kText: {
      const bool add_special = !request.has_add_special_tokens() || request.add_special_tokens();
      auto ids = model.tokenizer->Encode(request.text(), add_special);
      if (!ids.ok()) {
        return ids.status();
      }
      prompt.text = request.text();
      prompt.ids = *std::move(ids);
      break;
    }
    case GenerateRequest::kTokenIds:
      prompt.ids.assign(request.token_ids().ids().begin(), request.token_ids().ids().end());
      break;
    case GenerateRequest::kChatMessages: {
      auto rendered = RenderChat(request, model);
      if (!rendered.ok()) {
        return rendered.status();
      }
      prompt = *std::move(rendered);
      break;
    }
    case GenerateRequest::PROMPT_NOT_SET:
      return rpc::FieldError("prompt", "one of text, token_ids and chat_messages must be set");
  }
  if (prompt.ids.empty()) {
    return rpc::FieldError("prompt", "it yields no token");
  }
  for (const uint32_t id : prompt.ids) {
    if (id >= vocab_size) {
      return rpc::FieldError("token_ids.ids", absl::StrCat("id ", id, " is not below ", vocab_size,
                                                           ", the vocabulary's size"));
    }
  }
  return prompt;
}

absl::StatusOr<GenerationRequest> PrepareRequest(const GenerateRequest& request,
                                                 const ServedModel& model, uint32_t max_model_len) {
  if (absl::Status status = ValidateRequest(request, model, max_model_len); !status.ok()) {
    return status;
  }
  auto prompt = MakePrompt(request, model);
  if (!prompt.ok()) {
    return prompt.status();
  }
  if (prompt->ids.size() >= max_model_len) {
    return PromptTooLong(prompt->ids.size(), max_model_len);
  }
  GenerationRequest prepared;
  prepared.request_id = request.request_id().empty()
                            ? absl::StrCat("req-", absl::Hex(Random64(), absl::kZeroPad16))
                            : request.request_id();
  prepared.tokenizer = model.tokenizer;
  prepared.output = MakeOutput(request);
  RequestSpec& spec = prepared.spec;
  spec.n = request.has_n() ? request.n() : 1;
  const uint32_t room = max_model_len - static_cast<uint32_t>(prompt->ids.size());
  const uint32_t unset = request.has_chat_messages() ? kDefaultMaxTokensChat : kDefaultMaxTokens;
  spec.max_tokens = std::min(room, request.has_max_tokens() ? request.max_tokens() : unset);
  spec.end_ids = EndIds(request, model);
  spec.sampling = MakeSampling(request, spec.end_ids);
  if (request.echo()) {
    prepared.output.echo_ids = prompt->ids;
    prepared.output.echo_text = prompt->text;
    if (request.has_token_ids()) {
      auto text = model.tokenizer->Decode(prompt->ids, prepared.output.skip_special_tokens);
      if (!text.ok()) {
        return text.status();
      }
      prepared.output.echo_text = *std::move(text);
    }
  }
  spec.prompt = std::move(prompt->ids);
  return prepared;
}

}  // namespace sluice::controller
