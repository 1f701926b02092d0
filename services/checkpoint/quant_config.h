// How a Hugging Face folder says it is quantized: config.json, then quantize_config.json, then
// quant_config.json. The first that names a key wins; the others fill in what is missing, and a
// disagreement becomes a warning.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/checkpoint/json.h"

namespace sluice::checkpoint {

enum class QuantMethod : uint8_t { kNone, kGptq, kAwq, kBitsAndBytes };

struct QuantConfig {
  QuantMethod method = QuantMethod::kNone;
  uint32_t bits = 16;
  int64_t group_size = 0;     // -1: one group a row. 0 for kNone and kBitsAndBytes.
  bool zero_is_true = false;  // GPTQ "v2": zeros are stored as they are; "v1": as zero - 1.
  // GPTQ v1 written by subtracting a constant from whole words with borrow: undone by an add with
  // carry.
  bool packed_zeros = false;
  bool symmetric = false;  // As the configuration says; the zeros themselves decide
  bool mixed = false;      // GPTQ "dynamic": group size may differ by module; the tensors tell.
  std::vector<std::string> warnings;
};

// One parsed file; null JSON when it is not there.
struct QuantConfigFiles {
  Json config;           // config.json
  Json quantize_config;  // quantize_config.json
  Json quant_config;     // quant_config.json
};

// INVALID_ARGUMENT for values out of range, UNIMPLEMENTED by name, with what to do, for a method or
// layout that is not supported.
absl::StatusOr<QuantConfig> ParseQuantConfig(const QuantConfigFiles& files);

// "none", "gptq", "awq", "bitsandbytes".
const char* NameOf(QuantMethod method);

}  // namespace sluice::checkpoint
