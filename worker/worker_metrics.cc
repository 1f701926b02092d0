#include "worker/worker_metrics.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace sluice::worker {
namespace {

void CollectStage(uint32_t stage, const StageMetrics& metrics, metrics::Page* page) {
  const metrics::Labels labels = {{"stage", absl::StrCat(stage)}};
  page->AddHistogram("sluice_stage_compute_seconds", "Time a stage computed a step.",
                     metrics.compute_seconds, labels);
  page->AddHistogram("sluice_stage_wait_seconds",
                     "Time a stage waited for a step since the one before ended: the pipeline's "
                     "bubbles, and time without requests.",
                     metrics.wait_seconds, labels);
  if (metrics.activation_bytes.value() == 0) {
    return;  // The last stage sends no hidden states
  }
  const metrics::Labels hop = {{"from", absl::StrCat(stage)}, {"to", absl::StrCat(stage + 1)}};
  page->AddCounter("sluice_activation_bytes_total",
                   "Bytes of hidden states sent to the next stage.",
                   static_cast<double>(metrics.activation_bytes.value()), hop);
  page->AddHistogram("sluice_link_seconds",
                     "Time to hand the hidden states of a step to the link, with checksum and flow "
                     "control.",
                     metrics.link_seconds, hop);
}

}  // namespace

StageMetrics* WorkerMetrics::OfStage(uint32_t stage) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::unique_ptr<StageMetrics>& metrics = stages_[stage];
  if (metrics == nullptr) {
    metrics = std::make_unique<StageMetrics>();
  }
  return metrics.get();
}

void WorkerMetrics::SetMemory(const StageMemory& memory, uint64_t budget) {
  const uint64_t used = memory.weight_bytes + memory.kv_bytes + memory.workspace_bytes;
  weight_bytes_.Set(static_cast<double>(memory.weight_bytes));
  kv_bytes_.Set(static_cast<double>(memory.kv_bytes));
  workspace_bytes_.Set(static_cast<double>(memory.workspace_bytes));
  free_bytes_.Set(static_cast<double>(budget - std::min(budget, used)));
}

void WorkerMetrics::Collect(uint64_t epoch, metrics::Page* page) const {
  page->AddGauge("sluice_worker_epoch", "Number of the newest plan this worker has promised.",
                 static_cast<double>(epoch));
  page->AddGauge("sluice_worker_serving", "1 while this worker takes steps, else 0.",
                 serving.value());
  page->AddCounter("sluice_worker_faults_total", "Times this worker gave up a plan.",
                   static_cast<double>(faults.value()));
  const std::pair<const char*, const metrics::Gauge*> kinds[] = {{"weights", &weight_bytes_},
                                                                 {"kv", &kv_bytes_},
                                                                 {"workspace", &workspace_bytes_},
                                                                 {"free", &free_bytes_}};
  for (const auto& [kind, bytes] : kinds) {
    page->AddGauge("sluice_worker_memory_bytes", "Memory this worker may use, by what it is for.",
                   bytes->value(), {{"kind", kind}});
  }
  page->AddHistogram("sluice_shard_load_seconds",
                     "Time to pull, check and pack the weights of a shard.", load_seconds);
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [stage, metrics] : stages_) {
    CollectStage(stage, *metrics, page);
  }
}

}  // namespace sluice::worker
