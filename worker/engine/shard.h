// Shard: the weights of one LayerRange on the device, and the builder that makes it out of
// canonical tensors.
//
// The builder knows from the ModelConfig which tensors a shard has and which of them are uploaded
// together:
//
//   q, k, v      stacked along n, weights and biases
//                [(num_heads + 2 * num_kv_heads) * head_dim, hidden_size]
//   gate, up     stacked along n (Llama)   [2 * intermediate_size, hidden_size]
//   all others   alone
//
// The host copy of a tensor is freed as soon as its group is on the device.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "proto/sluice/internal/v1/shard.pb.h"

namespace sluice::worker {

// One decoder layer as its layer function sees it; a view of what Shard owns.
struct LayerWeights {
  Norm attention_norm;
  Linear qkv;
  Linear attention_out;
  Norm mlp_norm;
  Linear mlp_in;  // Llama: gate stacked on up; OPT: fc1
  Linear mlp_out;
};

// Owns the packed weights; everything else in it points to them. Immutable after
// ShardBuilder::Finish().
struct Shard {
  std::vector<LayerWeights> layers;
  const PackedMatrix* embed_tokens = nullptr;     // Stage 0
  const PackedMatrix* embed_positions = nullptr;  // Stage 0, OPT
  Linear project_in;                              // Stage 0, OPT with word_embed_dim != hidden_size
  Norm final_norm;                                // Last stage
  Linear project_out;  // Last stage, OPT with word_embed_dim != hidden_size
  Linear head;         // Last stage; embed_tokens itself when tied and both are here
  uint64_t bytes = 0;  // Device memory of all of them

  std::vector<std::unique_ptr<PackedMatrix>> matrices;
  std::vector<std::unique_ptr<DeviceVector>> vectors;
};

class ShardBuilder {
 public:
  // REQUIRES: CheckAssignment(assignment) is OK. `backend` must outlive the builder and its shard.
  ShardBuilder(const internal::v1::ShardAssignment& assignment, Backend* backend);

  // Takes one tensor; uploads its group when it is the last of it. INVALID_ARGUMENT names the
  // tensor: not of this shard, given twice, wrong shape or format, values that break a rule.
  // RESOURCE_EXHAUSTED: device full.
  absl::Status Add(const std::string& name, QuantizedMatrix tensor);

  // FAILED_PRECONDITION lists the tensors that are missing. The builder is empty afterwards.
  absl::StatusOr<std::unique_ptr<Shard>> Finish();

 private:
  struct Part {
    std::string name;
    int64_t n = 0;
    int64_t k = 0;
    bool present = false;
    QuantizedMatrix tensor;  // Until the group is uploaded
  };
  // Tensors that are uploaded together, and where in the shard the result is seen; one target is
  // set, or none when the tensor is accepted but not kept (a head that is tied to the embedding
  // beside it).
  struct Group {
    std::vector<Part> parts;
    const PackedMatrix** matrix = nullptr;
    int64_t pair_distance = 0;
    const DeviceVector** vector = nullptr;
    bool required = true;
  };
  // A linear layer: `names` without ".weight", each with its number of rows.
  struct LinearPart {
    std::string name;
    int64_t n = 0;
  };

  // pair_distance: Backend::UploadPaired; 0: none.
  void ExpectMatrix(const std::vector<LinearPart>& parts, int64_t k, const PackedMatrix** target,
                    int64_t pair_distance = 0);
  void ExpectVector(const std::vector<LinearPart>& parts, const DeviceVector** target);
  void ExpectLinear(const std::vector<LinearPart>& parts, int64_t k, bool bias, Linear* target,
                    int64_t pair_distance = 0);
  void ExpectNorm(const std::string& name, NormKind kind, Norm* target);
  void ExpectLlamaLayer(int number, LayerWeights* layer);
  void ExpectOptLayer(int number, LayerWeights* layer);
  void ExpectEnds();
  void AddGroup(Group group);
  absl::Status CheckTensor(const Part& part, bool is_vector, const QuantizedMatrix& tensor) const;
  absl::Status Upload(Group* group);

  internal::v1::ShardAssignment assignment_;
  Backend* const backend_;
  std::unique_ptr<Shard> shard_;
  std::vector<Group> groups_;
  absl::flat_hash_map<std::string, std::pair<int, int>> index_;  // Name -> group, part
};

}  // namespace sluice::worker
