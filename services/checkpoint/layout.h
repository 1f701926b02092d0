// The tensors a model must have, by its configuration alone: names, shapes and order. Everything
// found in a file is compared with this table before a byte of it is read.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/quant.h"
#include "proto/sluice/internal/v1/shard.pb.h"

namespace sluice::checkpoint {

// What a tensor may be: only a linear weight may be quantized.
enum class TensorRole : uint8_t { kVector, kTable, kLinear };

struct ExpectedTensor {
  std::string name;  // Canonical: "layers.3.self_attn.q_proj.weight".
  int64_t n = 1;     // Rows (out features); 1 for a vector.
  int64_t k = 1;
  TensorRole role = TensorRole::kVector;
};

// In the loader's order: embedding, layers, final norm, head. No head with tied embeddings.
// REQUIRES: the config passed CheckModelConfig.
std::vector<ExpectedTensor> ExpectedTensors(const internal::v1::ModelConfig& config);

// How transformers names the module that holds the canonical name: "model." or "model.decoder.",
// nothing for lm_head.
std::string HfName(const internal::v1::ModelConfig& config, const std::string& canonical);

internal::v1::TensorSpec ToProto(const std::string& name, const QuantSpec& spec);

}  // namespace sluice::checkpoint
