// ShardSource: the canonical tensors that one Fetch asks for, cut into parts of at most 1 MiB with
// a CRC32C. Quantized tensors are converted one ahead of the one being sent, on a thread of their
// own and within a MemoryBudget; plain ones are read part by part and never held.
//
//   tensor "layers.0.self_attn.q_proj.weight", 2.5 MiB of planes:
//     part 0: spec, offset 0, 1 MiB
//     part 1: offset 1 MiB, 1 MiB
//     part 2: offset 2 MiB, 0.5 MiB, last
//
// Order: embedding, layers, final norm and head; with tied embeddings the embedding table follows
// as "lm_head.weight".
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/sluice/internal/v1/weights.pb.h"
#include "services/checkpoint/checkpoint.h"
#include "services/loader/loader_metrics.h"
#include "services/loader/memory_budget.h"

namespace sluice::loader {

inline constexpr uint64_t kPartBytes = 1 << 20;

// One thread calls Next(); Stop() may come from any.
class ShardSource {
 public:
  // Checks the request: FAILED_PRECONDITION (another digest), INVALID_ARGUMENT (layers outside the
  // model, a resume part outside its tensor), NOT_FOUND (the resume name is not among the tensors
  // asked for). `metrics` counts conversions. All three must outlive the result.
  static absl::StatusOr<std::unique_ptr<ShardSource>> Open(
      const checkpoint::Checkpoint& checkpoint, MemoryBudget* budget, LoaderMetrics* metrics,
      const internal::v1::FetchRequest& request);

  ~ShardSource();

  // Fills in the next part; false at the end. Errors are the checkpoint's (INVALID_ARGUMENT,
  // DATA_LOSS), CANCELLED after Stop().
  absl::StatusOr<bool> Next(internal::v1::FetchResponse* part);

  // Makes Next() return soon.
  void Stop();

 private:
  // A tensor to send: its number in the checkpoint and the name it is sent under.
  struct Unit {
    int index;
    std::string name;
  };
  // A converted tensor and its share of the budget.
  struct Converted {
    absl::StatusOr<QuantizedMatrix> matrix;
    MemoryBudget::Share share;
  };

  ShardSource(const checkpoint::Checkpoint& checkpoint, MemoryBudget* budget,
              LoaderMetrics* metrics);
  void Select(const internal::v1::FetchRequest& request);
  absl::Status Resume(const internal::v1::FetchRequest& request);
  bool IsPlain(const Unit& unit) const;
  uint64_t BytesOf(const Unit& unit) const;
  void Convert(const std::stop_token& stop);
  absl::Status TakeConverted();

  const checkpoint::Checkpoint& checkpoint_;
  MemoryBudget* const budget_;
  LoaderMetrics* const metrics_;
  std::vector<Unit> units_;
  size_t first_ = 0;  // Where a resumed fetch begins; fixed before converter_ starts.
  size_t unit_ = 0;   // Being sent, with part_ the next part of it.
  uint32_t part_ = 0;
  bool send_spec_ = true;
  std::unique_ptr<Converted>
      current_;  // Of units_[unit_], when that is quantized and has been begun.

  std::mutex mutex_;  // Guards converted_.
  std::condition_variable_any changed_;
  std::deque<std::unique_ptr<Converted>> converted_;  // At most one: ready, not yet being sent.
  std::jthread converter_;
};

}  // namespace sluice::loader
