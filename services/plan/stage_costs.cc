#include "services/plan/stage_costs.h"

#include <algorithm>
#include <cstdlib>

#include "absl/strings/match.h"

namespace sluice::plan {
namespace {

using internal::v1::ModelConfig;
using internal::v1::PlanShardsResponse;

// Staging buffers, allocator slack and the program's own needs, on every stage.
constexpr uint64_t kFixedWorkspace = 32ull << 20;
constexpr uint64_t kFloat = 4;

uint64_t CeilDiv(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

// Index of "layers.7.fc1.weight", or -1.
int LayerOf(const std::string& name) {
  return absl::StartsWith(name, "layers.") ? std::atoi(name.c_str() + 7) : -1;
}

bool IsEmbedding(const std::string& name) {
  return absl::StartsWith(name, "embed_tokens.") || absl::StartsWith(name, "embed_positions.") ||
         absl::StartsWith(name, "project_in.");
}

void AddWeights(const PlanShardsResponse& model, ModelCosts& costs) {
  bool has_head = false;
  uint64_t table = 0;
  costs.layers.assign(model.config().num_layers(), 0);
  for (const auto& tensor : model.tensors()) {
    const int layer = LayerOf(tensor.name());
    if (layer >= 0 && layer < static_cast<int>(costs.layers.size())) {
      costs.layers[layer] += tensor.bytes();
    } else if (IsEmbedding(tensor.name())) {
      costs.embedding += tensor.bytes();
      table += absl::StartsWith(tensor.name(), "embed_tokens.") ? tensor.bytes() : 0;
    } else {
      costs.tail += tensor.bytes();
      has_head = has_head || absl::StartsWith(tensor.name(), "lm_head.");
    }
  }
  if (model.config().tie_word_embeddings() && !has_head) {
    costs.tied_table = table;
  }
}

// Upper bound of what a stage allocates for its largest step: rows of activations, and the
// backend's scratch (gathered and normalized input, the widest output).
void AddWorkspace(const ModelConfig& config, const PlanOptions& options, ModelCosts& costs) {
  const uint64_t rows = uint64_t{options.max_batch_tokens} + options.max_batch_size;
  const uint64_t hidden = config.hidden_size();
  const uint64_t mlp = config.intermediate_size();
  const uint64_t vocab = config.vocab_size();
  const uint64_t attention = uint64_t{config.num_heads()} * config.head_dim();
  const uint64_t qkv = attention + 2ull * config.num_kv_heads() * config.head_dim();
  const uint64_t widest_in = std::max({hidden, attention, mlp});
  const uint64_t widest_out = std::max({hidden, qkv, 2 * mlp});
  costs.workspace = kFixedWorkspace +
                    rows * kFloat * (hidden + qkv + attention + mlp + 2 * widest_in + widest_out);
  costs.head_workspace = uint64_t{options.max_batch_size} * vocab * kFloat;
  if (vocab > widest_out) {
    costs.head_workspace += rows * kFloat * (vocab - widest_out);
  }
}

}  // namespace

ModelCosts CostsOf(const PlanShardsResponse& model, const PlanOptions& options) {
  const ModelConfig& config = model.config();
  ModelCosts costs;
  AddWeights(model, costs);
  costs.kv_per_layer_block = 2ull * config.num_kv_heads() * config.head_dim() * options.block_size *
                             options.kv_element_bytes;
  AddWorkspace(config, options, costs);
  costs.max_model_len =
      options.max_model_len != 0 ? options.max_model_len : config.max_position_embeddings();
  costs.blocks_per_sequence =
      static_cast<uint32_t>(CeilDiv(costs.max_model_len, options.block_size));
  const uint64_t block_bytes = costs.kv_per_layer_block * config.num_layers();
  const uint64_t reserved = block_bytes == 0 ? 0 : CeilDiv(options.kv_reserve_bytes, block_bytes);
  costs.min_blocks = static_cast<uint32_t>(
      std::min<uint64_t>(std::max<uint64_t>(costs.blocks_per_sequence, reserved), 1u << 30));
  costs.max_blocks = static_cast<uint32_t>(std::min<uint64_t>(
      std::max<uint64_t>(costs.min_blocks,
                         static_cast<uint64_t>(costs.blocks_per_sequence) * options.max_batch_size),
      1u << 30));
  return costs;
}

uint64_t WeightBytes(const ModelCosts& costs, uint32_t begin, uint32_t end) {
  uint64_t bytes = begin == 0 ? costs.embedding : 0;
  for (uint32_t i = begin; i < end; ++i) {
    bytes += costs.layers[i];
  }
  if (end == costs.layers.size()) {
    bytes += costs.tail + (begin == 0 ? 0 : costs.tied_table);
  }
  return bytes;
}

uint64_t WorkspaceBytes(const ModelCosts& costs, uint32_t end) {
  return costs.workspace + (end == costs.layers.size() ? costs.head_workspace : 0);
}

uint64_t StageBytes(const ModelCosts& costs, uint32_t begin, uint32_t end, uint32_t blocks) {
  return WeightBytes(costs, begin, end) + WorkspaceBytes(costs, end) +
         costs.kv_per_layer_block * (end - begin) * blocks;
}

}  // namespace sluice::plan
