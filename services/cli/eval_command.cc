// sluice eval: how well models predict a text, how fast and in how much memory: that of a running
// server, or several, each served by a cluster of its own, one after another.
#include <atomic>
#include <cstdio>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "services/cli/answer_stream.h"
#include "services/cli/commands.h"
#include "services/cli/evaluation.h"
#include "services/cli/progress.h"
#include "services/cli/run_cluster.h"
#include "services/cli/signals.h"
#include "services/rpc/flags.h"

namespace sluice::cli {
namespace {

struct EvalFlags {
  std::string address = kDefaultAddress;
  std::string task = "perplexity";
  EvalOptions options;
  std::vector<std::string> models;  // Empty: the server at `address`
  UpOptions up;                     // Of their clusters
  bool json = false;
};

nlohmann::json JsonOf(const EvalResult& result) {
  return {{"model", result.model},
          {"format", result.format},
          {"task", "perplexity"},
          {"perplexity", result.perplexity.value()},
          {"tokens", result.perplexity.count()},
          {"window", result.window},
          {"stride", result.stride},
          {"weight_bytes", result.weight_bytes},
          {"prefill_tokens_per_second", static_cast<double>(result.prompt_tokens) / result.seconds},
          {"best_prefill_tokens_per_second", result.best_prefill_speed},
          {"best_decode_tokens_per_second", result.best_decode_speed}};
}

// One result is an object, several are an array.
void Print(const std::vector<EvalResult>& results, bool json) {
  if (json) {
    nlohmann::json list = nlohmann::json::array();
    for (const EvalResult& result : results) list.push_back(JsonOf(result));
    std::printf("%s\n", (list.size() == 1 ? list[0] : list).dump(2).c_str());
    return;
  }
  std::printf("%sperplexity over %zu tokens, window %zu, stride %zu\n", EvalTable(results).c_str(),
              results[0].perplexity.count(), results[0].window, results[0].stride);
}

// Measures one model when its cluster serves.
class EvalTask : public ClusterTask {
 public:
  explicit EvalTask(const EvalOptions& options) : options_(options) {}

  absl::Status Run(const ControllerAddresses& addresses) override {
    ProgressDisplay display(stderr);
    absl::StatusOr<EvalResult> result = Evaluate(
        addresses.public_address, options_,
        [&display](const std::string& line) { display.Show(line); }, stop_);
    if (!result.ok()) return result.status();
    result_ = *std::move(result);
    return absl::OkStatus();
  }
  void Cancel() override { stop_ = true; }
  bool cancelled() const { return stop_; }
  EvalResult Take() { return std::move(result_); }

 private:
  const EvalOptions& options_;
  std::atomic<bool> stop_{false};
  EvalResult result_;
};

int EvalModels(const EvalFlags& flags) {
  SignalQueue signals;  // Before any thread
  std::vector<EvalResult> results;
  for (const std::string& model : flags.models) {
    UpOptions options = flags.up;
    options.model = model;
    options.port = 0;
    options.admin_port = 0;
    std::fprintf(stderr, "%s\n", model.c_str());
    EvalTask task(flags.options);
    if (const int code = RunCluster(options, &signals, &task); code != 0) {
      std::fprintf(stderr, "sluice eval: %s was not measured\n", model.c_str());
      return code;
    }
    results.push_back(task.Take());
    if (results.back().perplexity.count() == 0) return 1;  // Stopped before it served
  }
  Print(results, flags.json);
  return 0;
}

int EvalServer(const EvalFlags& flags) {
  ProgressDisplay display(stderr);
  const std::atomic<bool> stop{false};
  absl::StatusOr<EvalResult> result = Evaluate(
      flags.address, flags.options, [&display](const std::string& line) { display.Show(line); },
      stop);
  display.Clear();
  if (!result.ok()) {
    std::fprintf(stderr, "%s\n", ErrorLine(result.status(), flags.address).c_str());
    return 1;
  }
  Print({*std::move(result)}, flags.json);
  return 0;
}

}  // namespace

void AddEvalCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = app.add_subcommand(
      "eval", "Measure how well models predict a text, how fast, and in how much memory");
  auto flags = std::make_shared<EvalFlags>();
  CLI::Option* address =
      rpc::AddFlag(*command, "address", &flags->address, "host:port of a running server");
  command
      ->add_option("--model", flags->models,
                   "Instead of a server: a model to serve and measure; may be given several times, "
                   "then the first is what the others are compared with")
      ->excludes(address)
      ->type_name("PATH")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  rpc::AddFlag(*command, "workers", &flags->up.workers, "--model: workers of each cluster")
      ->check(CLI::Range(0, 1024));
  rpc::AddFlag(*command, "threads", &flags->up.threads,
               "--model: threads of each CPU worker; 0: equal parts of the cores")
      ->check(CLI::Range(0, 1024));
  rpc::AddFlag(*command, "device", &flags->up.device, "--model: cpu, or cuda: worker N on GPU N")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  rpc::AddFlag(*command, "task", &flags->task, "What to measure")
      ->check(CLI::IsMember({"perplexity"}));
  rpc::AddFlag(*command, "file", &flags->options.file, "The text, UTF-8, at most 2 MiB")
      ->required();
  rpc::AddFlag(*command, "window", &flags->options.window,
               "Tokens of a window; 0: 2048, or the longest prompt if that is less");
  rpc::AddFlag(*command, "stride", &flags->options.stride,
               "Tokens between windows; 0: a quarter of the window");
  rpc::AddFlag(
      *command, "runs", &flags->options.speed_runs,
      "Answers of 64 tokens to the text's first 512 that are timed; the fastest counts; 0: none")
      ->check(CLI::Range(0, 100));
  command->add_flag("--json", flags->json, "JSON for programs");
  command->callback([flags, exit_code] {
    *exit_code = flags->models.empty() ? EvalServer(*flags) : EvalModels(*flags);
  });
}

}  // namespace sluice::cli
