#include "worker/engine/shard.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/core/status_macros.h"
#include "worker/engine/decoder_layer.h"

namespace sluice::worker {
namespace {

using internal::v1::ModelConfig;

constexpr int kMaxNamesInError = 8;

absl::Status TensorError(const std::string& name, const std::string& rule) {
  return absl::InvalidArgumentError(absl::StrCat("tensor ", name, ": ", rule));
}

// Puts the tensor's name before a message of a lower layer.
absl::Status WithName(const std::string& name, const absl::Status& status) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat("tensor ", name, ": ", status.message()));
}

}  // namespace

ShardBuilder::ShardBuilder(const internal::v1::ShardAssignment& assignment, Backend* backend)
    : assignment_(assignment), backend_(backend), shard_(std::make_unique<Shard>()) {
  const auto& range = assignment_.layers();
  shard_->layers.resize(range.end() - range.begin());  // Targets below point into it
  for (uint32_t number = range.begin(); number < range.end(); ++number) {
    LayerWeights* layer = &shard_->layers[number - range.begin()];
    if (assignment_.config().architecture() == internal::v1::ARCHITECTURE_OPT) {
      ExpectOptLayer(static_cast<int>(number), layer);
    } else {
      ExpectLlamaLayer(static_cast<int>(number), layer);
    }
  }
  ExpectEnds();
}

void ShardBuilder::AddGroup(Group group) {
  for (size_t part = 0; part < group.parts.size(); ++part) {
    index_[group.parts[part].name] = {static_cast<int>(groups_.size()), static_cast<int>(part)};
  }
  groups_.push_back(std::move(group));
}

void ShardBuilder::ExpectMatrix(const std::vector<LinearPart>& parts, int64_t k,
                                const PackedMatrix** target, int64_t pair_distance) {
  Group group;
  group.matrix = target;
  group.pair_distance = pair_distance;
  for (const LinearPart& part : parts) {
    group.parts.push_back({absl::StrCat(part.name, ".weight"), part.n, k, /*present=*/false, {}});
  }
  AddGroup(std::move(group));
}

void ShardBuilder::ExpectVector(const std::vector<LinearPart>& parts, const DeviceVector** target) {
  Group group;
  group.vector = target;
  for (const LinearPart& part : parts) {
    group.parts.push_back({part.name, 1, part.n, /*present=*/false, {}});
  }
  AddGroup(std::move(group));
}

void ShardBuilder::ExpectLinear(const std::vector<LinearPart>& parts, int64_t k, bool bias,
                                Linear* target, int64_t pair_distance) {
  ExpectMatrix(parts, k, &target->weight, pair_distance);
  if (!bias) return;
  std::vector<LinearPart> biases = parts;
  for (LinearPart& part : biases) part.name += ".bias";
  ExpectVector(biases, &target->bias);
}

void ShardBuilder::ExpectNorm(const std::string& name, NormKind kind, Norm* target) {
  const ModelConfig& config = assignment_.config();
  const int64_t hidden = config.hidden_size();
  target->kind = kind;
  target->eps = config.norm_eps();
  if (kind == NormKind::kLayer && !config.norm_affine()) return;
  ExpectVector({{absl::StrCat(name, ".weight"), hidden}}, &target->weight);
  if (kind == NormKind::kLayer) {
    ExpectVector({{absl::StrCat(name, ".bias"), hidden}}, &target->bias);
  }
}

void ShardBuilder::ExpectLlamaLayer(int number, LayerWeights* layer) {
  const ModelConfig& config = assignment_.config();
  const std::string prefix = absl::StrCat("layers.", number, ".");
  const std::string attention = prefix + "self_attn.";
  const std::string mlp = prefix + "mlp.";
  const int64_t hidden = config.hidden_size();
  const int64_t inner = config.intermediate_size();
  const int64_t q = int64_t{config.num_heads()} * config.head_dim();
  const int64_t kv = int64_t{config.num_kv_heads()} * config.head_dim();

  ExpectNorm(prefix + "input_layernorm", NormKind::kRms, &layer->attention_norm);
  ExpectLinear({{attention + "q_proj", q}, {attention + "k_proj", kv}, {attention + "v_proj", kv}},
               hidden, config.attention_bias(), &layer->qkv);
  ExpectLinear({{attention + "o_proj", hidden}}, q, config.attention_bias(), &layer->attention_out);
  ExpectNorm(prefix + "post_attention_layernorm", NormKind::kRms, &layer->mlp_norm);
  ExpectLinear({{mlp + "gate_proj", inner}, {mlp + "up_proj", inner}}, hidden, config.mlp_bias(),
               &layer->mlp_in);
  ExpectLinear({{mlp + "down_proj", hidden}}, inner, config.mlp_bias(), &layer->mlp_out);
}

void ShardBuilder::ExpectOptLayer(int number, LayerWeights* layer) {
  const ModelConfig& config = assignment_.config();
  const std::string prefix = absl::StrCat("layers.", number, ".");
  const std::string attention = prefix + "self_attn.";
  const int64_t hidden = config.hidden_size();
  const int64_t inner = config.intermediate_size();
  const int64_t q = int64_t{config.num_heads()} * config.head_dim();
  const int64_t kv = int64_t{config.num_kv_heads()} * config.head_dim();

  ExpectNorm(prefix + "self_attn_layer_norm", NormKind::kLayer, &layer->attention_norm);
  ExpectLinear({{attention + "q_proj", q}, {attention + "k_proj", kv}, {attention + "v_proj", kv}},
               hidden, config.attention_bias(), &layer->qkv);
  ExpectLinear({{attention + "out_proj", hidden}}, q, config.attention_bias(),
               &layer->attention_out);
  ExpectNorm(prefix + "final_layer_norm", NormKind::kLayer, &layer->mlp_norm);
  ExpectLinear({{prefix + "fc1", inner}}, hidden, config.mlp_bias(), &layer->mlp_in);
  ExpectLinear({{prefix + "fc2", hidden}}, inner, config.mlp_bias(), &layer->mlp_out);
}

void ShardBuilder::ExpectEnds() {
  const ModelConfig& config = assignment_.config();
  const bool opt = config.architecture() == internal::v1::ARCHITECTURE_OPT;
  const int64_t hidden = config.hidden_size();
  const int64_t vocab = config.vocab_size();
  const int64_t width = opt ? config.word_embed_dim() : hidden;
  if (assignment_.has_embedding()) {
    ExpectMatrix({{"embed_tokens", vocab}}, width, &shard_->embed_tokens);
    if (opt) {
      ExpectMatrix({{"embed_positions", config.max_position_embeddings() + kOptFirstPositionRow}},
                   hidden, &shard_->embed_positions);
    }
    if (width != hidden) {
      ExpectLinear({{"project_in", hidden}}, width, /*bias=*/false, &shard_->project_in);
    }
  }
  if (!assignment_.has_head()) return;
  if (!opt) ExpectNorm("norm", NormKind::kRms, &shard_->final_norm);
  if (opt && config.has_final_norm()) {
    ExpectNorm("final_layer_norm", NormKind::kLayer, &shard_->final_norm);
  }
  if (width != hidden) {
    ExpectLinear({{"project_out", width}}, hidden, /*bias=*/false, &shard_->project_out);
  }
  const bool share = assignment_.has_embedding() && config.tie_word_embeddings();
  ExpectMatrix({{"lm_head", vocab}}, width, share ? nullptr : &shard_->head.weight);
  groups_.back().required = !share;
}

absl::Status ShardBuilder::CheckTensor(const Part& part, bool is_vector,
                                       const QuantizedMatrix& tensor) const {
  SLUICE_RETURN_IF_ERROR(WithName(part.name, CheckSpec(tensor.spec)));
  if (tensor.spec.n != part.n || tensor.spec.k != part.k) {
    return TensorError(part.name,
                       absl::StrCat("shape [", tensor.spec.n, ", ", tensor.spec.k, "] must be [",
                                    part.n, ", ", part.k, "] by the model's config"));
  }
  if (is_vector && tensor.spec.format != QuantFormat::kPlain) {
    return TensorError(part.name,
                       absl::StrCat("a vector must be plain, not ", NameOf(tensor.spec.format)));
  }
  if (tensor.planes.size() != SizesOf(tensor.spec).total()) {
    return TensorError(part.name, absl::StrCat(tensor.planes.size(), " bytes, its spec needs ",
                                               SizesOf(tensor.spec).total()));
  }
  return WithName(part.name, CheckValues(tensor));
}

absl::Status ShardBuilder::Add(const std::string& name, QuantizedMatrix tensor) {
  const auto found = index_.find(name);
  if (found == index_.end()) {
    return TensorError(name,
                       absl::StrCat("not part of layers [", assignment_.layers().begin(), ", ",
                                    assignment_.layers().end(), ") of a model with this config"));
  }
  Group& group = groups_[found->second.first];
  Part& part = group.parts[found->second.second];
  if (part.present) return TensorError(name, "given twice");
  SLUICE_RETURN_IF_ERROR(CheckTensor(part, group.vector != nullptr, tensor));
  part.present = true;
  part.tensor = std::move(tensor);
  for (const Part& other : group.parts) {
    if (!other.present) return absl::OkStatus();
  }
  return Upload(&group);
}

absl::Status ShardBuilder::Upload(Group* group) {
  std::vector<const QuantizedMatrix*> tensors;
  for (const Part& part : group->parts) tensors.push_back(&part.tensor);
  const std::string& name = group->parts[0].name;
  if (group->matrix != nullptr) {
    auto matrix = backend_->UploadPaired(tensors, group->pair_distance);
    SLUICE_RETURN_IF_ERROR(WithName(name, matrix.status()));
    *group->matrix = matrix->get();
    shard_->bytes += (*matrix)->bytes();
    shard_->matrices.push_back(*std::move(matrix));
  } else if (group->vector != nullptr) {
    auto vector = backend_->UploadVector(tensors);
    SLUICE_RETURN_IF_ERROR(WithName(name, vector.status()));
    *group->vector = vector->get();
    shard_->bytes += (*vector)->size() * sizeof(float);
    shard_->vectors.push_back(*std::move(vector));
  }
  for (Part& part : group->parts) part.tensor = QuantizedMatrix();
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Shard>> ShardBuilder::Finish() {
  std::vector<std::string> missing;
  for (const Group& group : groups_) {
    for (const Part& part : group.parts) {
      if (group.required && !part.present) missing.push_back(part.name);
    }
  }
  if (!missing.empty()) {
    const size_t count = missing.size();
    if (count > kMaxNamesInError) missing.resize(kMaxNamesInError);
    return absl::FailedPreconditionError(absl::StrCat(
        count, " tensors are missing: ", absl::StrJoin(missing, ", "),
        count > kMaxNamesInError ? ", ..." : "", "; pull the shard again from the loader"));
  }
  if (assignment_.has_head() && shard_->head.weight == nullptr) {
    shard_->head.weight = shard_->embed_tokens;
  }
  groups_.clear();
  index_.clear();
  return std::move(shard_);
}

}  // namespace sluice::worker
