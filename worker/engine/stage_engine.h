// StageEngine: one stage of the pipeline on one device. Owns shard, KV cache, sequence table and
// backend; all calls come from one thread, steps in order. Knows block ids and sequence ids, not
// requests; no gRPC here.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "proto/sluice/internal/v1/shard.pb.h"

namespace sluice::worker {

// Memory a stage takes, bytes.
struct StageMemory {
  uint64_t weight_bytes = 0;
  uint64_t kv_bytes = 0;
  uint64_t workspace_bytes = 0;
};

class StageEngine {
 public:
  // Takes the tensors of the shard one by one (canonical names of TensorSpec), uploads a weight as
  // soon as its parts (q, k, v) are there.
  class Loader {
   public:
    virtual ~Loader() = default;
    // INVALID_ARGUMENT: unknown name, wrong shape for the config, twice, or values that break a
    // rule.
    virtual absl::Status Add(const std::string& name, QuantizedMatrix tensor) = 0;
    // FAILED_PRECONDITION lists tensors that are missing. Allocates KV cache and workspace.
    virtual absl::StatusOr<std::unique_ptr<StageEngine>> Finish() = 0;
  };

  // `backend` must outlive the engine.
  static absl::StatusOr<std::unique_ptr<Loader>> NewLoader(
      const internal::v1::ShardAssignment& assignment, Backend* backend);

  virtual ~StageEngine() = default;

  // Forgets all sequences and takes the numbers of a new plan with the same layers (epoch change).
  // Reallocates KV when num_blocks, block_size or limits changed. FAILED_PRECONDITION: another
  // model, layers or ends; nothing changes then. After RESOURCE_EXHAUSTED the engine refuses steps
  // until a Reconfigure succeeds.
  virtual absl::Status Reconfigure(const internal::v1::ShardAssignment& assignment) = 0;

  // Hidden rows of a step on the wire: [num_tokens, hidden_size] of the backend's activation dtype.
  virtual int64_t hidden_row_bytes() const = 0;
  virtual DType hidden_dtype() const = 0;

  struct StepInput {
    const internal::v1::StepHeader* header = nullptr;
    const uint8_t* hidden_states =
        nullptr;  // Stages after the first; num_tokens * hidden_row_bytes() bytes
    uint64_t hidden_bytes = 0;
  };
  struct StepOutput {
    std::vector<uint8_t> hidden_states;  // Stages before the last; reused from step to step
    internal::v1::TokenFrame tokens;     // Last stage: epoch, step, slot, tokens and prompt_scores
  };

  // Ids that the ring brought, inputs of steps that run ahead. A step that names a sampled_by_step
  // not yet known must not be run: see HasInputs. With one stage the engine keeps its own samples;
  // AddSampled is then not needed.
  virtual void AddSampled(const internal::v1::TokenFrame& frame) = 0;
  virtual bool HasInputs(const internal::v1::StepHeader& header) const = 0;

  // Runs one step. Before it computes, it checks everything that came from outside:
  // INVALID_ARGUMENT names the field (block id outside the pool, rows above max_batch_tokens, a
  // sequence without its first slice, positions with a gap, wrong number of hidden bytes). A
  // refused step changes nothing here, its releases included; whether its sequences can go on
  // depends on the other stages.
  virtual absl::Status Step(const StepInput& input, StepOutput* output) = 0;

  virtual StageMemory memory() const = 0;
  virtual const internal::v1::ShardAssignment& assignment() const = 0;

  // Last stage: the logits [num_tokens, vocab_size] of every row of the last step, sampled or not.
  // For comparison with other implementations; allocates.
  virtual std::vector<float> LogitsForTest() = 0;
};

}  // namespace sluice::worker
