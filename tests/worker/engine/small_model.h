// Small random models for tests of the engine: a ModelConfig and its tensors by canonical name,
// plain float32.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "kernels/quant.h"
#include "proto/sluice/internal/v1/shard.pb.h"

namespace sluice::worker {

struct SmallTensor {
  int64_t n = 0;
  int64_t k = 0;
  std::vector<float> values;  // [n, k]
};

struct SmallModel {
  internal::v1::ModelConfig config;
  std::map<std::string, SmallTensor> tensors;

  // The tensors that the loader sends for this assignment: with tied embeddings the table is also
  // sent as the head.
  std::vector<std::string> NamesFor(const internal::v1::ShardAssignment& assignment) const;
  const SmallTensor& at(const std::string& name) const { return tensors.at(name); }
};

// Llama with grouped-query attention and everything optional: biases on attention and MLP, llama3
// scaling.
SmallModel MakeLlama(uint32_t seed);
// Llama with tied embeddings and dynamic scaling whose original length is 8.
SmallModel MakeTiedDynamicLlama(uint32_t seed);
// OPT with pre-norm and final norm.
SmallModel MakeOpt(uint32_t seed);
// OPT-350m's shape: embedding narrower than the residual stream, norms after each residual add, no
// final norm.
SmallModel MakeOpt350m(uint32_t seed);

// As kPlain float32.
QuantizedMatrix ToMatrix(const SmallTensor& tensor);

// Whether the loader sends the canonical tensor `name` for this assignment.
bool IsPartOf(const std::string& name, const internal::v1::ShardAssignment& assignment);

// Stage `stage` of `stages`: the layers divided as evenly as they go.
internal::v1::ShardAssignment MakeAssignment(const internal::v1::ModelConfig& config,
                                             uint32_t stage, uint32_t stages);
inline internal::v1::ShardAssignment MakeAssignment(const SmallModel& model, uint32_t stage,
                                                    uint32_t stages) {
  return MakeAssignment(model.config, stage, stages);
}

}  // namespace sluice::worker
