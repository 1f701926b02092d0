// sluice convert: a checkpoint as a Hugging Face folder, unquantized or quantized to 4 bits.
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/checkpoint.h"
#include "services/cli/commands.h"
#include "services/cli/progress.h"
#include "services/cli/signals.h"
#include "services/convert/convert.h"
#include "services/rpc/flags.h"

namespace sluice::cli {
namespace {

using convert::Format;

constexpr Format kFormats[] = {Format::kFloat16, Format::kBFloat16, Format::kFloat32, Format::kGptq,
                               Format::kAwq,     Format::kNf4,      Format::kFp4};

struct ConvertFlags {
  std::string source;
  std::string revision;
  std::string to;
  std::string output;
  std::string max_shard_size = "5GB";
  convert::ConvertOptions options;
  bool asymmetric = false;
  // Whether the user said so
  bool has_group_size = false;
};

// The format's own flags with another format would be silently without effect.
absl::StatusOr<convert::ConvertOptions> OptionsOf(const ConvertFlags& flags) {
  convert::ConvertOptions options = flags.options;
  for (const Format format : kFormats) {
    if (flags.to == convert::NameOf(format)) options.format = format;
  }
  const bool groups = options.format == Format::kGptq || options.format == Format::kAwq;
  const bool tables = options.format == Format::kNf4 || options.format == Format::kFp4;
  const auto unsuited = [&flags](const char* flag, const char* suited) {
    return absl::InvalidArgumentError(
        absl::StrCat(flag, " means nothing for --to ", flags.to, "; it is for ", suited));
  };
  if (flags.has_group_size && !groups) return unsuited("--group-size", "gptq and awq");
  if (options.double_quant && !tables) return unsuited("--double-quant", "nf4 and fp4");
  if (flags.asymmetric && options.format != Format::kGptq) {
    return unsuited("--asymmetric", "gptq (awq always has zero points)");
  }
  options.symmetric = !flags.asymmetric;
  absl::StatusOr<uint64_t> shard = rpc::ParseBytes(flags.max_shard_size);
  if (!shard.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--max-shard-size: ", std::string(shard.status().message())));
  }
  options.max_shard_bytes = *shard;
  return options;
}

absl::StatusOr<convert::ConvertResult> RunConversion(const ConvertFlags& flags) {
  SLUICE_ASSIGN_OR_RETURN(const convert::ConvertOptions options, OptionsOf(flags));
  SLUICE_ASSIGN_OR_RETURN(const auto source,
                          checkpoint::Checkpoint::Open(flags.source, flags.revision));
  for (const std::string& warning : source->description().warnings()) {
    std::fprintf(stderr, "warning: %s\n", warning.c_str());
  }
  SignalQueue signals;  // Ctrl-C leaves nothing behind
  ProgressDisplay display(stderr);
  return convert::Convert(*source, options, flags.output, [&](uint64_t done, uint64_t total) {
    const int percent = static_cast<int>(done * 100 / total);
    display.Show(absl::StrFormat("%s  %.1f of %.1f million weights", ProgressBar(percent),
                                 static_cast<double>(done) / 1e6,
                                 static_cast<double>(total) / 1e6));
    return signals.Wait(std::chrono::milliseconds(0)) == 0;
  });
}

int Convert(const ConvertFlags& flags) {
  const auto result = RunConversion(flags);
  if (!result.ok()) {
    std::fprintf(stderr, "sluice convert: %s\n", std::string(result.status().message()).c_str());
    return 1;
  }
  for (const std::string& note : result->notes) std::fprintf(stderr, "note: %s\n", note.c_str());
  std::printf("%s: %s, %.1f MiB of weights in %zu file%s, %zu tensors, %zu linears quantized\n",
              flags.output.c_str(), flags.to.c_str(),
              static_cast<double>(result->weight_bytes) / (1 << 20), result->files,
              result->files == 1 ? "" : "s", result->tensors, result->quantized);
  return 0;
}

}  // namespace

void AddConvertCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = app.add_subcommand(
      "convert", "Write a checkpoint as a Hugging Face folder: unquantized, or in 4 bits");
  auto flags = std::make_shared<ConvertFlags>();
  command
      ->add_option("source", flags->source,
                   "Model folder, .gguf file, or name in the Hugging Face cache")
      ->required();
  rpc::AddFlag(*command, "revision", &flags->revision,
               "Branch, tag or commit of a model of the Hugging Face cache; default: main");
  rpc::AddFlag(*command, "to", &flags->to, "Format of the folder")
      ->required()
      ->check(CLI::IsMember({"fp16", "bf16", "fp32", "gptq", "awq", "nf4", "fp4"}));
  rpc::AddFlag(*command, "output", &flags->output, "Folder to write; must not exist")->required();
  CLI::Option* group =
      rpc::AddFlag(*command, "group-size", &flags->options.group_size,
                   "gptq, awq: columns that share a scale, e.g. 128, 64, 32; -1: a whole row");
  rpc::AddSwitch(*command, "asymmetric", &flags->asymmetric,
                 "gptq: a zero point for each group (format v2)");
  rpc::AddSwitch(*command, "double-quant", &flags->options.double_quant,
                 "nf4, fp4: scales in 8 bits");
  rpc::AddFlag(*command, "max-shard-size", &flags->max_shard_size,
               "Largest weight file; a larger model gets several and an index");
  command->callback([flags, group, exit_code] {
    flags->has_group_size = group->count() > 0;
    *exit_code = Convert(*flags);
  });
}

}  // namespace sluice::cli
