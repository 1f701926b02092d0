// sluice eval: how well a running server's model predicts a text.
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/core/status_macros.h"
#include "proto/sluice/v1/generation.grpc.pb.h"
#include "services/cli/answer_stream.h"
#include "services/cli/commands.h"
#include "services/cli/perplexity.h"
#include "services/cli/progress.h"
#include "services/rpc/channel.h"
#include "services/rpc/flags.h"
#include "services/rpc/grpc_status.h"

namespace sluice::cli {
namespace {

constexpr size_t kMaxTextBytes = 2 << 20;  // Of one Tokenize call
constexpr uint32_t kDefaultWindow = 2048;

struct EvalFlags {
  std::string address = kDefaultAddress;
  std::string task = "perplexity";
  std::string file;
  uint32_t window = 0;
  uint32_t stride = 0;
  bool json = false;
};

struct EvalResult {
  std::string model;
  Perplexity perplexity;
  size_t window = 0, stride = 0;
  uint64_t prompt_tokens = 0;  // Sent, the overlap of windows included
  double seconds = 0;
};

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

class Evaluation {
 public:
  explicit Evaluation(const EvalFlags& flags)
      : flags_(flags),
        stub_(v1::GenerationService::NewStub(
            rpc::MakeChannel(flags.address, rpc::ChannelKind::kClient))) {}

  absl::StatusOr<EvalResult> Run() {
    SLUICE_RETURN_IF_ERROR(Tokenize());
    const auto start = std::chrono::steady_clock::now();
    const auto windows = EvalWindows(ids_.size(), result_.window, result_.stride);
    ProgressDisplay display(stderr);
    for (size_t i = 0; i < windows.size(); ++i) {
      SLUICE_RETURN_IF_ERROR(Score(windows[i]));
      display.Show(absl::StrFormat("window %d of %d, perplexity so far %.3f", i + 1, windows.size(),
                                   result_.perplexity.value()));
    }
    result_.seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return result_;
  }

 private:
  // Ids of the text, and windows that suit the model's longest context.
  absl::Status Tokenize() {
    v1::TokenizeRequest request;
    SLUICE_ASSIGN_OR_RETURN(*request.mutable_text(), ReadText(flags_.file));
    v1::TokenizeResponse response;
    grpc::ClientContext context;
    if (const auto status = stub_->Tokenize(&context, request, &response); !status.ok()) {
      return rpc::FromGrpcStatus(status);
    }
    ids_.assign(response.token_ids().begin(), response.token_ids().end());
    if (ids_.size() < 2) {
      return absl::InvalidArgumentError(
          absl::StrCat("--file ", flags_.file, ": one token only; nothing can be predicted"));
    }
    const uint32_t longest = response.max_model_len() - 1;  // A request asks for one token more
    if (flags_.window > longest) {
      return absl::InvalidArgumentError(absl::StrCat("--window ", flags_.window,
                                                     ": this server's "
                                                     "longest prompt has ",
                                                     longest, " tokens"));
    }
    result_.window = flags_.window != 0 ? flags_.window : std::min(kDefaultWindow, longest);
    result_.stride = flags_.stride != 0 ? flags_.stride : (result_.window + 3) / 4;
    if (result_.window < 2 || result_.stride >= result_.window) {
      return absl::InvalidArgumentError(absl::StrCat(
          "--stride ", result_.stride, ": must be below the window of ", result_.window));
    }
    return absl::OkStatus();
  }

  absl::Status Score(const EvalWindow& window) {
    v1::GenerateRequest request;
    const auto first = ids_.begin() + static_cast<ptrdiff_t>(window.begin);
    const auto last = ids_.begin() + static_cast<ptrdiff_t>(window.end);
    request.mutable_token_ids()->mutable_ids()->Assign(first, last);
    request.set_max_tokens(1);
    request.set_prompt_logprobs(0);
    v1::GenerateResponse response;
    grpc::ClientContext context;
    if (const auto status = stub_->Generate(&context, request, &response); !status.ok()) {
      return rpc::FromGrpcStatus(status);
    }
    if (response.prompt_logprobs_size() + 1 != request.token_ids().ids_size()) {
      return absl::InternalError("the server left out scores of the prompt");
    }
    for (size_t id = window.first_scored; id < window.end; ++id) {
      const int entry = static_cast<int>(id - window.begin) - 1;
      result_.perplexity.Add(response.prompt_logprobs(entry).chosen().logprob());
    }
    result_.model = response.model();
    result_.prompt_tokens += window.end - window.begin;
    return absl::OkStatus();
  }

  const EvalFlags& flags_;
  std::unique_ptr<v1::GenerationService::Stub> stub_;
  std::vector<uint32_t> ids_;
  EvalResult result_;
};

void Print(const EvalResult& result, bool json) {
  const double speed = static_cast<double>(result.prompt_tokens) / result.seconds;
  if (json) {
    const nlohmann::json out = {{"model", result.model},
                                {"task", "perplexity"},
                                {"perplexity", result.perplexity.value()},
                                {"tokens", result.perplexity.count()},
                                {"window", result.window},
                                {"stride", result.stride},
                                {"prefill_tokens_per_second", speed}};
    std::printf("%s\n", out.dump(2).c_str());
    return;
  }
  std::printf("%s: perplexity %.4f over %zu tokens (window %zu, stride %zu), %.0f tokens/s\n",
              result.model.c_str(), result.perplexity.value(), result.perplexity.count(),
              result.window, result.stride, speed);
}

int Eval(const EvalFlags& flags) {
  const auto result = Evaluation(flags).Run();
  if (!result.ok()) {
    std::fprintf(stderr, "%s\n", ErrorLine(result.status(), flags.address).c_str());
    return 1;
  }
  Print(*result, flags.json);
  return 0;
}

}  // namespace

void AddEvalCommand(CLI::App& app, int* exit_code) {
  CLI::App* command =
      app.add_subcommand("eval", "Measure how well a running server's model predicts a text");
  auto flags = std::make_shared<EvalFlags>();
  rpc::AddFlag(*command, "address", &flags->address, "host:port of the server");
  rpc::AddFlag(*command, "task", &flags->task, "What to measure")
      ->check(CLI::IsMember({"perplexity"}));
  rpc::AddFlag(*command, "file", &flags->file, "The text, UTF-8, at most 2 MiB")->required();
  rpc::AddFlag(*command, "window", &flags->window,
               "Tokens of a window; 0: 2048, or the longest prompt if that is less");
  rpc::AddFlag(*command, "stride", &flags->stride,
               "Tokens between windows; 0: a quarter of the window");
  command->add_flag("--json", flags->json, "JSON for programs");
  command->callback([flags, exit_code] { *exit_code = Eval(*flags); });
}

}  // namespace sluice::cli
