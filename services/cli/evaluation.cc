#include "services/cli/evaluation.h"

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iterator>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/core/status_macros.h"
#include "proto/sluice/v1/generation.grpc.pb.h"
#include "proto/sluice/v1/model.grpc.pb.h"
#include "services/cli/answer_stream.h"
#include "services/rpc/channel.h"
#include "services/rpc/grpc_status.h"

namespace sluice::cli {
namespace {

constexpr size_t kMaxTextBytes = 2 << 20;  // Of one Tokenize call
constexpr uint32_t kDefaultWindow = 2048;
constexpr size_t kSpeedPromptTokens = 512;
constexpr uint32_t kSpeedTokens = 64;

using Clock = std::chrono::steady_clock;

absl::StatusOr<std::string> ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    return absl::NotFoundError(absl::StrCat("--file ", path, ": cannot be opened"));
  }
  std::string text{std::istreambuf_iterator<char>(file), {}};
  if (text.empty() || text.size() > kMaxTextBytes) {
    return absl::InvalidArgumentError(absl::StrCat("--file ", path, ": ", text.size(),
                                                   " bytes; give a text of 1 to ", kMaxTextBytes));
  }
  return text;
}

std::string FormatOf(const v1::Quantization& quantization) {
  if (quantization.method() == "none") return absl::StrCat("none, ", quantization.bits(), " bits");
  return absl::StrCat(
      quantization.method(), " ", quantization.detail(),
      quantization.group_size() == 0 ? "" : absl::StrCat(", g", quantization.group_size()));
}

class Evaluation {
 public:
  Evaluation(const std::string& address, const EvalOptions& options,
             const std::function<void(const std::string&)>& show, const std::atomic<bool>& stop)
      : address_(address), options_(options), show_(show), stop_(stop) {
    const auto channel = rpc::MakeChannel(address, rpc::ChannelKind::kClient);
    generation_ = v1::GenerationService::NewStub(channel);
    models_ = v1::ModelService::NewStub(channel);
  }

  absl::StatusOr<EvalResult> Run() {
    SLUICE_RETURN_IF_ERROR(Tokenize());
    SLUICE_RETURN_IF_ERROR(Describe());
    const auto windows = EvalWindows(ids_.size(), result_.window, result_.stride);
    for (size_t i = 0; i < windows.size(); ++i) {
      SLUICE_RETURN_IF_ERROR(Score(windows[i]));
      show_(absl::StrFormat("%s: window %d of %d, perplexity so far %.3f", result_.model, i + 1,
                            windows.size(), result_.perplexity.value()));
    }
    for (uint32_t run = 0; run < options_.speed_runs; ++run) {
      SLUICE_RETURN_IF_ERROR(MeasureSpeed());
      show_(absl::StrFormat("%s: run %d of %d, best %.0f tokens/s prefill, %.1f decode",
                            result_.model, run + 1, options_.speed_runs, result_.best_prefill_speed,
                            result_.best_decode_speed));
    }
    return std::move(result_);
  }

 private:
  // Ids of the text, and windows that suit the model's longest context.
  absl::Status Tokenize() {
    v1::TokenizeRequest request;
    SLUICE_ASSIGN_OR_RETURN(*request.mutable_text(), ReadText(options_.file));
    v1::TokenizeResponse response;
    grpc::ClientContext context;
    if (const auto status = generation_->Tokenize(&context, request, &response); !status.ok()) {
      return rpc::FromGrpcStatus(status);
    }
    ids_.assign(response.token_ids().begin(), response.token_ids().end());
    if (ids_.size() < 2) {
      return absl::InvalidArgumentError(
          absl::StrCat("--file ", options_.file, ": one token only; nothing can be predicted"));
    }
    longest_prompt_ = response.max_model_len() - 1;  // A request asks for one token more
    if (options_.window > longest_prompt_) {
      return absl::InvalidArgumentError(absl::StrCat("--window ", options_.window,
                                                     ": this server's "
                                                     "longest prompt has ",
                                                     longest_prompt_, " tokens"));
    }
    result_.window =
        options_.window != 0 ? options_.window : std::min(kDefaultWindow, longest_prompt_);
    result_.stride = options_.stride != 0 ? options_.stride : (result_.window + 3) / 4;
    if (result_.window < 2 || result_.stride >= result_.window) {
      return absl::InvalidArgumentError(absl::StrCat(
          "--stride ", result_.stride, ": must be below the window of ", result_.window));
    }
    return absl::OkStatus();
  }

  absl::Status Describe() {
    v1::ListModelsResponse response;
    grpc::ClientContext context;
    if (const auto status = models_->ListModels(&context, {}, &response); !status.ok()) {
      return rpc::FromGrpcStatus(status);
    }
    if (response.models_size() != 1) return absl::UnavailableError("the server has no model yet");
    result_.model = response.models(0).name();
    result_.format = FormatOf(response.models(0).quantization());
    result_.weight_bytes = response.models(0).weight_bytes();
    return absl::OkStatus();
  }

  absl::Status Score(const EvalWindow& window) {
    if (stop_) return absl::CancelledError("stopped");
    v1::GenerateRequest request;
    const auto first = ids_.begin() + static_cast<ptrdiff_t>(window.begin);
    const auto last = ids_.begin() + static_cast<ptrdiff_t>(window.end);
    request.mutable_token_ids()->mutable_ids()->Assign(first, last);
    request.set_max_tokens(1);
    request.set_prompt_logprobs(0);
    v1::GenerateResponse response;
    grpc::ClientContext context;
    const Clock::time_point begin = Clock::now();
    if (const auto status = generation_->Generate(&context, request, &response); !status.ok()) {
      return rpc::FromGrpcStatus(status);
    }
    result_.seconds += std::chrono::duration<double>(Clock::now() - begin).count();
    if (response.prompt_logprobs_size() + 1 != request.token_ids().ids_size()) {
      return absl::InternalError("the server left out scores of the prompt");
    }
    for (size_t id = window.first_scored; id < window.end; ++id) {
      const int entry = static_cast<int>(id - window.begin) - 1;
      result_.perplexity.Add(response.prompt_logprobs(entry).chosen().logprob());
    }
    result_.prompt_tokens += window.end - window.begin;
    return absl::OkStatus();
  }

  // One greedy answer to the beginning of the text.
  absl::Status MeasureSpeed() {
    if (stop_) return absl::CancelledError("stopped");
    v1::StreamGenerateRequest request;
    const uint32_t tokens = std::min(kSpeedTokens, longest_prompt_ / 2 + 1);
    const size_t prompt =
        std::min<size_t>({ids_.size(), kSpeedPromptTokens, longest_prompt_ + 1 - tokens});
    request.mutable_token_ids()->mutable_ids()->Assign(
        ids_.begin(), ids_.begin() + static_cast<ptrdiff_t>(prompt));
    request.set_max_tokens(tokens);
    request.set_temperature(0);
    request.set_ignore_eos(true);
    grpc::ClientContext context;
    const StreamedAnswer answer =
        StreamAnswer(address_, request, &context, [](const std::string&) {});
    SLUICE_RETURN_IF_ERROR(answer.status);
    result_.best_prefill_speed = std::max(result_.best_prefill_speed,
                                          static_cast<double>(prompt) / answer.first_token_seconds);
    result_.best_decode_speed = std::max(result_.best_decode_speed, answer.tokens_per_second);
    return absl::OkStatus();
  }

  const std::string& address_;
  const EvalOptions& options_;
  const std::function<void(const std::string&)>& show_;
  const std::atomic<bool>& stop_;
  std::unique_ptr<v1::GenerationService::Stub> generation_;
  std::unique_ptr<v1::ModelService::Stub> models_;
  std::vector<uint32_t> ids_;
  uint32_t longest_prompt_ = 0;
  EvalResult result_;
};

}  // namespace

absl::StatusOr<EvalResult> Evaluate(const std::string& address, const EvalOptions& options,
                                    const std::function<void(const std::string&)>& show,
                                    const std::atomic<bool>& stop) {
  return Evaluation(address, options, show, stop).Run();
}

std::string EvalTable(const std::vector<EvalResult>& results) {
  size_t model_width = 5, format_width = 6;
  for (const EvalResult& result : results) {
    model_width = std::max(model_width, result.model.size());
    format_width = std::max(format_width, result.format.size());
  }
  std::string table = absl::StrFormat("%-*s  %-*s  %11s  %11s  %10s  %10s  %s\n", model_width,
                                      "model", format_width, "format", "weights MiB", "prefill t/s",
                                      "decode t/s", "perplexity", "difference");
  const double first = results.empty() ? 0 : results[0].perplexity.value();
  for (const EvalResult& result : results) {
    const double value = result.perplexity.value();
    absl::StrAppendFormat(&table, "%-*s  %-*s  %11.1f  %11.0f  %10.1f  %10.3f  %+.3f (%+.1f %%)\n",
                          model_width, result.model, format_width, result.format,
                          static_cast<double>(result.weight_bytes) / (1 << 20),
                          result.best_prefill_speed, result.best_decode_speed, value, value - first,
                          first == 0 ? 0 : 100 * (value / first - 1));
  }
  return table;
}

}  // namespace sluice::cli
