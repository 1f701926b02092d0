// What a worker counts, and how a scrape shows it. The parts that run steps only touch StageMetrics:
// atomics, no lock.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "services/metrics/page.h"
#include "worker/engine/stage_engine.h"

namespace sluice::worker {

// Seconds of a step's parts: a decode on a GPU to a long prefill on a CPU.
inline constexpr double kStepBounds[] = {.0001, .00025, .0005, .001, .0025, .005, .01, .025,
                                         .05,   .1,     .25,   .5,   1,     2.5,  5,   10};
// Seconds of a load.
inline constexpr double kLoadBounds[] = {.1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800};

// Of the steps that a worker ran as one stage. Thread-safe.
struct StageMetrics {
  metrics::Histogram compute_seconds{kStepBounds};
  // From the end of the step before to the beginning of this one: the bubble, and idle time.
  metrics::Histogram wait_seconds{kStepBounds};
  // Handing a step's hidden states to the link, with checksum, copying and flow control.
  metrics::Histogram link_seconds{kStepBounds};
  metrics::Counter activation_bytes;  // Of hidden states sent to the next stage
};

// Thread-safe.
class WorkerMetrics {
 public:
  // Of this stage; lives as long as this object. Takes a lock: ask once an epoch.
  StageMetrics* OfStage(uint32_t stage);

  // `budget`: what the worker may use, bytes. All zero: no shard is held.
  void SetMemory(const StageMemory& memory, uint64_t budget);

  metrics::Histogram load_seconds{kLoadBounds};
  metrics::Counter faults;
  metrics::Gauge serving;  // 1 while an epoch is open

  // `epoch`: the highest one promised.
  void Collect(uint64_t epoch, metrics::Page* page) const;

 private:
  metrics::Gauge weight_bytes_;
  metrics::Gauge kv_bytes_;
  metrics::Gauge workspace_bytes_;
  metrics::Gauge free_bytes_;
  mutable std::mutex mutex_;  // Guards the map, not what it holds
  std::map<uint32_t, std::unique_ptr<StageMetrics>> stages_;
};

}  // namespace sluice::worker
