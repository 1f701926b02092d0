#include "worker/engine/workspace.h"

#include <algorithm>
#include <utility>

#include "kernels/core/status_macros.h"

namespace sluice::worker {

using internal::v1::ModelConfig;
using internal::v1::ShardAssignment;

absl::StatusOr<std::unique_ptr<Workspace>> Workspace::Create(const ShardAssignment& assignment,
                                                             int64_t extra_rows, Backend* backend) {
  const ModelConfig& config = assignment.config();
  const bool opt = config.architecture() == internal::v1::ARCHITECTURE_OPT;
  const int64_t rows = assignment.max_batch_tokens();
  const int64_t hidden = config.hidden_size();
  const int64_t attention = int64_t{config.num_heads()} * config.head_dim();
  const int64_t qkv = attention + 2 * int64_t{config.num_kv_heads()} * config.head_dim();
  const int64_t mlp = config.intermediate_size();
  const int64_t embedding = opt && config.word_embed_dim() != hidden ? config.word_embed_dim() : 0;
  const int64_t vocab = assignment.has_head() ? config.vocab_size() : 0;

  auto workspace = std::make_unique<Workspace>();
  Activations& full = workspace->full_;
  SLUICE_RETURN_IF_ERROR(workspace->AllocateRows(rows + extra_rows, hidden, backend, &full.hidden));
  SLUICE_RETURN_IF_ERROR(workspace->AllocateRows(rows, qkv, backend, &full.qkv));
  SLUICE_RETURN_IF_ERROR(workspace->AllocateRows(rows, attention, backend, &full.attention));
  SLUICE_RETURN_IF_ERROR(workspace->AllocateRows(rows, mlp, backend, &full.mlp));
  if (assignment.has_embedding() && embedding > 0) {
    SLUICE_RETURN_IF_ERROR(workspace->AllocateRows(rows, embedding, backend, &full.embedding));
  }
  SLUICE_RETURN_IF_ERROR(
      backend->Reserve({.max_rows = rows + extra_rows,
                        .max_n = std::max({hidden, qkv, opt ? mlp : 2 * mlp, embedding, vocab}),
                        .max_k = std::max({hidden, attention, mlp, embedding}),
                        .max_heads = config.num_heads(),
                        .max_context = assignment.max_model_len(),
                        .num_kv_heads = config.num_kv_heads(),
                        .head_dim = config.head_dim(),
                        .block_size = assignment.block_size(),
                        .step_rows = rows,
                        .max_sequences = assignment.max_batch_size(),
                        .vocab = vocab}));
  return workspace;
}

absl::Status Workspace::AllocateRows(int64_t rows, int64_t cols, Backend* backend,
                                     TensorView* view) {
  const DType dtype = backend->activation_dtype();
  const int64_t bytes = rows * cols * static_cast<int64_t>(SizeOf(dtype));
  SLUICE_ASSIGN_OR_RETURN(auto buffer, backend->Allocate(bytes));
  *view = {.data = buffer->data(), .dtype = dtype, .rows = rows, .cols = cols, .stride = cols};
  buffers_.push_back(std::move(buffer));
  bytes_ += static_cast<uint64_t>(bytes);
  return absl::OkStatus();
}

Activations Workspace::Rows(int64_t num_rows) const {
  return {.hidden = full_.hidden.Rows(0, num_rows),
          .qkv = full_.qkv.Rows(0, num_rows),
          .attention = full_.attention.Rows(0, num_rows),
          .mlp = full_.mlp.Rows(0, num_rows),
          .embedding = full_.embedding.Rows(0, num_rows)};
}

}  // namespace sluice::worker
