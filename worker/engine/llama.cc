// Llama 1/2/3 and its kin: RMS norm, rotary embedding, grouped-query attention, gated MLP.
#include "worker/engine/decoder_layer.h"

namespace sluice::worker {

void LlamaEmbed(const Shard& shard, absl::Span<const uint32_t> token_ids,
                absl::Span<const uint32_t> positions, const LayerContext& context) {
  context.backend->Embed(*shard.embed_tokens, token_ids, context.a.hidden);
}

void LlamaLayer(const LayerWeights& weights, const KvLayer& kv, const LayerContext& context) {
  Backend& backend = *context.backend;
  const Activations& a = context.a;

  // hidden += out(attention(norm(hidden)))
  backend.NormQkv(weights.attention_norm, a.hidden, weights.qkv,
                  {&context.rope, context.sequences, &kv}, a.qkv);
  backend.PagedAttention(a.qkv, context.sequences, kv, context.attention_scale, a.attention);
  backend.MatMulResidual(a.attention, weights.attention_out, a.hidden);

  // hidden += down(act(gate(norm(hidden))) * up(norm(hidden)))
  backend.NormGateUp(weights.mlp_norm, a.hidden, weights.mlp_in, context.activation, a.mlp);
  backend.MatMulResidual(a.mlp, weights.mlp_out, a.hidden);
}

}  // namespace sluice::worker
