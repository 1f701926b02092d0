// The small files of a converted folder: config.json, generation_config.json and the tokenizer's.
#pragma once

#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "services/checkpoint/checkpoint.h"
#include "services/convert/convert.h"

namespace sluice::convert {

// Base name -> content. A Hugging Face folder's files are copied, with config.json's quantization and
// dtype replaced; those of a GGUF file are made from its keys and vocabulary (UNIMPLEMENTED for a
// vocabulary that services/text does not know).
absl::StatusOr<std::map<std::string, std::string>> FolderFiles(const checkpoint::Checkpoint& source,
                                                               const ConvertOptions& options);

}  // namespace sluice::convert
