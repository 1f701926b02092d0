// config.json and generation_config.json of a Hugging Face model -> ModelConfig. Reads the keys of
// transformers 4 (torch_dtype, rope_theta, rope_scaling) and 5 (dtype, rope_parameters).
#pragma once

#include "absl/status/statusor.h"
#include "proto/sluice/internal/v1/shard.pb.h"
#include "services/checkpoint/json.h"

namespace sluice::checkpoint {

// `generation` is null JSON when there is no generation_config.json. INVALID_ARGUMENT names file,
// field and rule; UNIMPLEMENTED names a model type, activation or rope type that is not supported.
// `dtype` of the result is empty when the config does not tell.
absl::StatusOr<internal::v1::ModelConfig> ParseHfConfig(const Json& config, const Json& generation);

// Rules that hold for every source: counts within 1,000 layers, 2^17 hidden, 2^21 vocabulary; kv
// heads divide heads; an even head size where there is rope; eos and bos inside of the vocabulary.
// `file` starts the message.
absl::Status CheckModelConfig(const internal::v1::ModelConfig& config, const std::string& file);

}  // namespace sluice::checkpoint
