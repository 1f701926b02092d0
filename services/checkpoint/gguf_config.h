// Keys and names of a GGUF file -> ModelConfig, canonical tensor names and the vocabulary as JSON.
// Architecture `llama`.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "proto/sluice/internal/v1/shard.pb.h"
#include "services/checkpoint/gguf.h"

namespace sluice::checkpoint {

// INVALID_ARGUMENT for missing keys or values out of range, UNIMPLEMENTED, by name, for another
// architecture or an option that a Llama of this program does not have (experts, yarn).
absl::StatusOr<internal::v1::ModelConfig> ParseGgufConfig(const GgufFile& gguf);

// "blk.3.attn_q.weight" for the canonical "layers.3.self_attn.q_proj.weight". REQUIRES: a name of
// ExpectedTensors().
std::string GgufName(const std::string& canonical);

// The vocabulary: {"model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id",
// "eos_token_id", "unknown_token_id", "padding_token_id", "add_bos_token", "add_eos_token",
// "add_space_prefix", "chat_template"}; what the file does not hold is left out. INVALID_ARGUMENT
// when lengths or ids do not fit the tokens.
absl::StatusOr<std::string> GgufVocabularyJson(const GgufFile& gguf, uint32_t vocab_size);

}  // namespace sluice::checkpoint
