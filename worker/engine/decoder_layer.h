// One function per architecture for a decoder layer, and one for what comes before the first layer.
// They call one backend operation per line and know nothing of sequences, messages or devices.
#pragma once

#include "absl/types/span.h"
#include "kernels/backend.h"
#include "worker/engine/shard.h"

namespace sluice::worker {

// Activations of a step; every view has the step's rows (M) and the dtype of the backend.
struct Activations {
  TensorView hidden;     // [M, hidden_size]: the residual stream
  TensorView qkv;        // [M, (num_heads + 2 * num_kv_heads) * head_dim]
  TensorView attention;  // [M, num_heads * head_dim]
  TensorView mlp;        // [M, intermediate_size]
  TensorView embedding;  // [M, word_embed_dim]: OPT with projections, else empty
};

// What all layers of a step share.
struct LayerContext {
  Backend* backend = nullptr;
  absl::Span<const SequenceRows> sequences;
  RopeRows rope;              // Llama
  float attention_scale = 0;  // head_dim ^ -0.5
  Activation activation = Activation::kNone;
  bool norm_before = true;  // OPT
  Activations a;
};

// Adds one layer to context.a.hidden and writes its keys and values to `kv`.
using LayerFunction = void (*)(const LayerWeights& weights, const KvLayer& kv,
                               const LayerContext& context);
void LlamaLayer(const LayerWeights& weights, const KvLayer& kv, const LayerContext& context);
void OptLayer(const LayerWeights& weights, const KvLayer& kv, const LayerContext& context);

// Fills context.a.hidden from token ids [M] and position rows [M] (OPT: row of the table of
// positions).
using EmbedFunction = void (*)(const Shard& shard, absl::Span<const uint32_t> token_ids,
                               absl::Span<const uint32_t> positions, const LayerContext& context);
void LlamaEmbed(const Shard& shard, absl::Span<const uint32_t> token_ids,
                absl::Span<const uint32_t> positions, const LayerContext& context);
void OptEmbed(const Shard& shard, absl::Span<const uint32_t> token_ids,
              absl::Span<const uint32_t> positions, const LayerContext& context);

// Row of OPT's table of learned positions that position 0 has.
inline constexpr uint32_t kOptFirstPositionRow = 2;

}  // namespace sluice::worker
