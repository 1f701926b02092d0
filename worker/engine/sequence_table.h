// SequenceTable: what a stage remembers of each sequence between steps: its block table, the next
// position, on the last stage its tokens and sampling parameters, on the first and last the newest
// sampled id (input of steps that run ahead). It applies steps that StepChecker has accepted; it
// refuses nothing itself.
//
// Vectors of a sequence are reserved for max_model_len when it enters and reused after its release,
// so that a step without new sequences allocates nothing.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"
#include "proto/sluice/internal/v1/shard.pb.h"

namespace sluice::worker {

struct Sequence {
  uint64_t seq_id = 0;
  uint32_t next_pos = 0;  // Position of the next input token
  uint32_t prompt_len = 0;
  std::vector<uint32_t> block_table;
  // Step of the newest slice when that slice was sampled, else 0: the only step that
  // sampled_by_step may name.
  uint64_t sampled_step = 0;
  // The id that sampled_step chose, once known. First and last stage.
  std::optional<uint32_t> sampled_id;

  // Last stage only.
  internal::v1::SamplingParams sampling;
  std::vector<uint32_t> tokens;  // By position: prompt, then what was sampled
  std::vector<uint8_t>
      held_row;  // Hidden row that scores the first prompt token of the next chunk, or empty
};

class SequenceTable {
 public:
  struct Options {
    uint32_t num_blocks = 0;
    uint32_t block_size = 0;     // Tokens
    uint32_t max_model_len = 0;  // Tokens
    bool keep_history = false;   // Last stage
  };
  static constexpr uint64_t kNoStep = 0;

  explicit SequenceTable(const Options& options);

  // Null when there is none of this id.
  const Sequence* Find(uint64_t seq_id) const;
  Sequence* Find(uint64_t seq_id);

  // The sequence that `block_id` belongs to; null when it is free. REQUIRES: block_id < num_blocks.
  const Sequence* OwnerOf(uint32_t block_id) const { return owners_[block_id]; }

  // Ends a sequence and frees its blocks; nothing happens when the id is unknown.
  void Release(uint64_t seq_id);
  void ReleaseAll();

  // Takes a slice of step `step`: enters the sequence when it is new, appends blocks and
  // (keep_history) tokens, moves next_pos and forgets the sampled id. Read sampled_id before, for a
  // slice that runs ahead.
  Sequence* Apply(uint64_t step, const internal::v1::SequenceSlice& slice);

  // Keeps the id that a step sampled: from the ring, or from this stage's own sampler. Ignored when
  // the sequence has gone or has no use for it.
  void AddSampled(uint64_t step, uint64_t seq_id, uint32_t token_id);

  size_t size() const { return sequences_.size(); }
  uint32_t free_blocks() const { return free_blocks_; }

 private:
  std::unique_ptr<Sequence> NewSequence();

  const Options options_;
  absl::flat_hash_map<uint64_t, std::unique_ptr<Sequence>> sequences_;
  std::vector<std::unique_ptr<Sequence>> spare_;  // Released ones, kept for their vectors
  std::vector<const Sequence*> owners_;           // By block id
  uint32_t free_blocks_ = 0;
};

}  // namespace sluice::worker
