// Models for planner tests: descriptions as the loader would give them, without any file.
#pragma once

#include <string>

#include "absl/strings/str_cat.h"
#include "proto/sluice/internal/v1/weights.pb.h"

namespace sluice::plan {

inline void AddTensor(internal::v1::PlanShardsResponse& model, const std::string& source,
                      const std::string& canonical, uint64_t bytes) {
  auto* stored = model.add_source_tensors();
  stored->set_name(source);
  stored->set_bytes(bytes);
  auto* tensor = model.add_tensors();
  tensor->set_name(canonical);
  tensor->set_bytes(bytes);
}

// Llama with `layers` layers of `layer_bytes`, an embedding of `table_bytes`, and a head of its own
// unless tied. One KV block of 32 tokens is 32 KiB a layer with float32 (2 heads of 64).
inline internal::v1::PlanShardsResponse SmallLlama(uint32_t layers, uint64_t layer_bytes,
                                                   uint64_t table_bytes, bool tied) {
  internal::v1::PlanShardsResponse model;
  auto* config = model.mutable_config();
  config->set_architecture(internal::v1::ARCHITECTURE_LLAMA);
  config->set_num_layers(layers);
  config->set_hidden_size(128);
  config->set_intermediate_size(256);
  config->set_num_heads(2);
  config->set_num_kv_heads(2);
  config->set_head_dim(64);
  config->set_vocab_size(1000);
  config->set_max_position_embeddings(2048);
  config->set_tie_word_embeddings(tied);
  AddTensor(model, "model.embed_tokens.weight", "embed_tokens.weight", table_bytes);
  for (uint32_t i = 0; i < layers; ++i) {
    const std::string layer = absl::StrCat("layers.", i);
    AddTensor(model, absl::StrCat("model.", layer, ".self_attn.q_proj.weight"),
              layer + ".self_attn.q_proj.weight", layer_bytes / 2);
    AddTensor(model, absl::StrCat("model.", layer, ".mlp.up_proj.weight"),
              layer + ".mlp.up_proj.weight", layer_bytes - layer_bytes / 2);
  }
  AddTensor(model, "model.norm.weight", "norm.weight", 256);
  if (!tied) {
    AddTensor(model, "lm_head.weight", "lm_head.weight", table_bytes);
  }
  return model;
}

}  // namespace sluice::plan
