// What a stage costs in bytes, from canonical tensors and limits of a step: weights, KV cache,
// workspace.
#pragma once

#include <cstdint>
#include <vector>

#include "services/plan/device_map.h"
#include "services/plan/stage_cut.h"

namespace sluice::plan {

// Bytes of a model's parts. Weights are those of the canonical form, which is what travels to the
// workers.
struct ModelCosts {
  std::vector<uint64_t> layers;  // One a layer
  uint64_t embedding = 0;        // Table, positions, project_in: first stage
  uint64_t tail = 0;             // Norm, head, project_out: last stage
  uint64_t tied_table = 0;  // Head = table: copied to the last stage unless it is the first one too
  uint64_t kv_per_layer_block = 0;  // K and V of one block in one layer
  uint64_t workspace = 0;           // Of any stage
  uint64_t head_workspace = 0;      // More on the last stage: logits
  uint32_t max_model_len = 0;
  uint32_t blocks_per_sequence = 0;  // Blocks of one sequence of max_model_len
  uint32_t min_blocks = 0;           // Blocks that must fit on every stage
  uint32_t max_blocks = 0;           // More blocks than this can never be used
};

// REQUIRES: options.block_size, max_batch_size and max_batch_tokens are not 0.
ModelCosts CostsOf(const internal::v1::PlanShardsResponse& model, const PlanOptions& options);

// Weights of layers [begin, end) with what the first and the last stage hold besides.
uint64_t WeightBytes(const ModelCosts& costs, uint32_t begin, uint32_t end);

// Workspace of that stage.
uint64_t WorkspaceBytes(const ModelCosts& costs, uint32_t end);

// All that must fit: weights, workspace, `blocks` KV blocks.
uint64_t StageBytes(const ModelCosts& costs, uint32_t begin, uint32_t end, uint32_t blocks);

}  // namespace sluice::plan
