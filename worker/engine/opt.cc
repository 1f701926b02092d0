// OPT: layer norm, learned positions, biases. In OPT-350m the norms come after each residual add,
// and the embedding is narrower than the residual stream.
#include "worker/engine/decoder_layer.h"

namespace sluice::worker {

void OptEmbed(const Shard& shard, absl::Span<const uint32_t> token_ids,
              absl::Span<const uint32_t> positions, const LayerContext& context) {
  Backend& backend = *context.backend;
  const Activations& a = context.a;
  if (shard.project_in.weight != nullptr) {
    backend.Embed(*shard.embed_tokens, token_ids, a.embedding);
    backend.NormMatMul(Norm(), a.embedding, shard.project_in, Activation::kNone, a.hidden);
  } else {
    backend.Embed(*shard.embed_tokens, token_ids, a.hidden);
  }
  backend.AddEmbedding(*shard.embed_positions, positions, a.hidden);
}

void OptLayer(const LayerWeights& weights, const KvLayer& kv, const LayerContext& context) {
  Backend& backend = *context.backend;
  const Activations& a = context.a;
  const Norm none;
  const bool before = context.norm_before;

  // hidden += out(attention(norm(hidden))), or hidden = norm(hidden + out(attention(hidden)))
  backend.NormQkv(before ? weights.attention_norm : none, a.hidden, weights.qkv,
                  {/*rope=*/nullptr, context.sequences, &kv}, a.qkv);
  backend.PagedAttention(a.qkv, context.sequences, kv, context.attention_scale, a.attention);
  backend.MatMulResidual(a.attention, weights.attention_out, a.hidden);
  if (!before) backend.ApplyNorm(weights.attention_norm, a.hidden);

  // hidden += fc2(act(fc1(norm(hidden)))), or hidden = norm(hidden + fc2(act(fc1(hidden))))
  backend.NormMatMul(before ? weights.mlp_norm : none, a.hidden, weights.mlp_in, context.activation,
                     a.mlp);
  backend.MatMulResidual(a.mlp, weights.mlp_out, a.hidden);
  if (!before) backend.ApplyNorm(weights.mlp_norm, a.hidden);
}

}  // namespace sluice::worker
