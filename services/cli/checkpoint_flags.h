// The flags that name a model, for every command that opens one.
#pragma once

#include <string>

#include "services/rpc/flags.h"

namespace sluice::cli {

inline void AddCheckpointFlags(CLI::App& command, std::string* model, std::string* revision) {
  rpc::AddFlag(command, "model", model,
               "Model folder, .gguf file, or name in the Hugging Face cache")
      ->required();
  rpc::AddFlag(command, "revision", revision,
               "Branch, tag or commit of a model of the Hugging Face cache; default: main");
}

}  // namespace sluice::cli
