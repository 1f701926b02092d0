// sluice inspect: what a checkpoint is, and what is odd or wrong with it, before anything is served.
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/value_check.h"
#include "services/cli/checkpoint_flags.h"
#include "services/cli/commands.h"
#include "services/cli/progress.h"
#include "services/rpc/flags.h"

namespace sluice::cli {
namespace {

using internal::v1::PlanShardsResponse;

struct InspectFlags {
  std::string model;
  std::string revision;
  bool headers = false;
  bool json = false;
};

struct KindTotals {
  uint64_t tensors = 0;
  uint64_t bytes = 0;  // As workers hold them, before packing
  uint64_t elements = 0;
};

// Kind of module of a canonical tensor name.
const char* KindOf(const std::string& name) {
  if (absl::StrContains(name, "norm")) return "norms";
  if (absl::StrContains(name, "self_attn.")) return "attention";
  if (absl::StrContains(name, "lm_head") || absl::StrContains(name, "project_out")) return "head";
  if (absl::StrContains(name, "embed") || absl::StrContains(name, "project_in")) return "embedding";
  return "MLP";
}

std::map<std::string, KindTotals> TotalsOf(const PlanShardsResponse& model) {
  std::map<std::string, KindTotals> totals;
  for (const internal::v1::TensorSpec& tensor : model.tensors()) {
    for (const char* kind : {KindOf(tensor.name()), "all"}) {
      KindTotals& total = totals[kind];
      ++total.tensors;
      total.bytes += tensor.bytes();
      total.elements += tensor.n() * tensor.k();
    }
  }
  return totals;
}

std::string QuantizationOf(const PlanShardsResponse& model) {
  const internal::v1::QuantSummary& quant = model.quant();
  if (quant.method() == "none") {
    return absl::StrCat("none, ", quant.bits(), " bits");
  }
  return absl::StrCat(quant.method(), " ", quant.detail(), ", ", quant.bits(), " bits, group size ",
                      quant.group_size() == 0 ? "varies" : absl::StrCat(quant.group_size()),
                      quant.act_order() ? ", act-order" : "",
                      quant.symmetric() ? ", symmetric" : "");
}

void PrintText(const PlanShardsResponse& model, const checkpoint::ValueReport& report) {
  const internal::v1::ModelConfig& config = model.config();
  std::printf("model         %s\n", model.model_name().c_str());
  std::printf(
      "architecture  %s: %u layers, hidden %u, %u heads, %u KV heads, vocabulary %u, context %u\n",
      config.model_type().c_str(), config.num_layers(), config.hidden_size(), config.num_heads(),
      config.num_kv_heads(), config.vocab_size(), config.max_position_embeddings());
  std::printf("quantization  %s\n", QuantizationOf(model).c_str());
  std::printf("written by    %s\n", model.writer().empty() ? "unknown" : model.writer().c_str());
  std::printf("tensors       %d in the file, %d canonical\n\n", model.source_tensors_size(),
              model.tensors_size());
  std::printf("%-10s %8s %12s %14s\n", "kind", "tensors", "MiB", "bits a weight");
  auto totals = TotalsOf(model);
  for (const char* kind : {"embedding", "attention", "MLP", "norms", "head", "all"}) {
    const KindTotals& total = totals[kind];
    if (total.tensors == 0) continue;  // A tied head
    std::printf("%-10s %8llu %12.1f %14.2f\n", kind, static_cast<unsigned long long>(total.tensors),
                static_cast<double>(total.bytes) / (1 << 20),
                8.0 * static_cast<double>(total.bytes) / static_cast<double>(total.elements));
  }
  for (const std::string& warning : model.warnings()) std::printf("warning: %s\n", warning.c_str());
  for (const std::string& warning : report.warnings) std::printf("warning: %s\n", warning.c_str());
  for (const std::string& error : report.errors) std::printf("error: %s\n", error.c_str());
  if (report.more_errors > 0) {
    std::printf("error: and %llu more\n", static_cast<unsigned long long>(report.more_errors));
  }
}

void PrintJson(const PlanShardsResponse& model, const checkpoint::ValueReport& report) {
  nlohmann::json out;
  out["model"] = model.model_name();
  out["architecture"] = model.config().model_type();
  out["layers"] = model.config().num_layers();
  out["quantization"] = {
      {"method", model.quant().method()},       {"detail", model.quant().detail()},
      {"bits", model.quant().bits()},           {"group_size", model.quant().group_size()},
      {"act_order", model.quant().act_order()}, {"symmetric", model.quant().symmetric()}};
  out["writer"] = model.writer();
  out["source_tensors"] = model.source_tensors_size();
  for (const auto& [kind, total] : TotalsOf(model)) {
    out["kinds"][kind] = {{"tensors", total.tensors}, {"bytes", total.bytes}};
  }
  std::vector<std::string> warnings(model.warnings().begin(), model.warnings().end());
  warnings.insert(warnings.end(), report.warnings.begin(), report.warnings.end());
  out["warnings"] = warnings;
  out["errors"] = report.errors;
  std::printf("%s\n", out.dump(2).c_str());
}

int Inspect(const InspectFlags& flags) {
  const auto checkpoint = checkpoint::Checkpoint::Open(flags.model, flags.revision);
  if (!checkpoint.ok()) {
    std::fprintf(stderr, "sluice inspect: %s\n",
                 std::string(checkpoint.status().message()).c_str());
    return 1;
  }
  const PlanShardsResponse& model = (*checkpoint)->description();
  checkpoint::ValueReport report;
  if (!flags.headers) {
    ProgressDisplay display(stderr);
    report = checkpoint::CheckAllValues(**checkpoint, [&](int done) {
      display.Show(absl::StrFormat("reading values: %d %%", done * 10 / model.tensors_size() * 10));
      return true;
    });
  }
  flags.json ? PrintJson(model, report) : PrintText(model, report);
  return report.errors.empty() ? 0 : 1;
}

}  // namespace

void AddInspectCommand(CLI::App& app, int* exit_code) {
  CLI::App* command =
      app.add_subcommand("inspect", "Show what a checkpoint is, and what is odd or wrong with it");
  auto flags = std::make_shared<InspectFlags>();
  AddCheckpointFlags(*command, &flags->model, &flags->revision);
  command->add_flag("--headers", flags->headers, "Headers alone: read no values");
  command->add_flag("--json", flags->json, "JSON for programs");
  command->callback([flags, exit_code] { *exit_code = Inspect(*flags); });
}

}  // namespace sluice::cli
