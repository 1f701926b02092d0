// What the controller counts, and how a scrape shows it: vLLM's words and buckets after "sluice_",
// and what only a pipeline has. The loop's thread changes it, atomics only; scrapes read it.
#pragma once

#include <array>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "services/controller/sequence.h"
#include "services/metrics/page.h"

namespace sluice::controller {

// Buckets of vLLM. Seconds but for the last three.
inline constexpr double kFirstTokenBounds[] = {.001, .005, .01, .02, .04, .06, .08, .1,
                                               .25,  .5,   .75, 1,   2.5, 5,   7.5, 10,
                                               20,   40,   80,  160, 640, 2560};
inline constexpr double kTokenBounds[] = {.01, .025, .05, .075, .1,  .15, .2, .3, .4, .5,
                                          .75, 1,    2.5, 5,    7.5, 10,  20, 40, 80};
inline constexpr double kRequestBounds[] = {.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                            30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
inline constexpr double kLengthBounds[] = {
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000};
inline constexpr double kAnswersBounds[] = {1, 2, 5, 10, 20};
inline constexpr double kStepTokensBounds[] = {1,   8,    16,   32,   64,   128,  256,
                                               512, 1024, 2048, 4096, 8192, 16384};
inline constexpr double kRecoveryBounds[] = {.1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300};

// Where a request was when its client gave it up.
enum class RequestPhase { kQueue, kPrefill, kDecode };

// Thread-safe.
class ControllerMetrics {
 public:
  // Of requests. An answer counts by itself: a request of n answers gives n samples, but one of
  // queue time, n and max_tokens.
  metrics::Counter prompt_tokens;  // Of requests whose first token came
  metrics::Counter generation_tokens;
  metrics::Histogram first_token_seconds{kFirstTokenBounds};
  metrics::Histogram inter_token_seconds{kTokenBounds};
  metrics::Histogram per_output_token_seconds{kTokenBounds};
  metrics::Histogram e2e_seconds{kRequestBounds};
  metrics::Histogram queue_seconds{kRequestBounds};
  metrics::Histogram inference_seconds{kRequestBounds};
  metrics::Histogram prefill_seconds{kRequestBounds};
  metrics::Histogram decode_seconds{kRequestBounds};
  metrics::Histogram answer_prompt_tokens{kLengthBounds};
  metrics::Histogram answer_generation_tokens{kLengthBounds};
  metrics::Histogram params_n{kAnswersBounds};
  metrics::Histogram params_max_tokens{kLengthBounds};
  void Finished(EndReason reason) { finished_[static_cast<size_t>(reason)].Add(); }
  void Cancelled(RequestPhase phase) { cancelled_[static_cast<size_t>(phase)].Add(); }
  // Not accepted, and why.
  void Refused(const absl::Status& status);
  // Accepted, and ended by an error.
  void Failed(const absl::Status& status);

  // Of the pipeline.
  metrics::Counter steps;
  metrics::Histogram step_tokens{kStepTokensBounds};  // Rows of a step
  metrics::Counter plans_lost;
  metrics::Histogram recovery_seconds{kRecoveryBounds};  // From a loss until it serves again
  metrics::Gauge requests_running;                       // Answers that hold KV blocks
  metrics::Gauge requests_waiting;
  metrics::Gauge kv_usage;  // 0..1
  metrics::Gauge steps_in_flight;
  metrics::Gauge epoch;
  metrics::Gauge serving;  // 1 or 0
  metrics::Gauge workers_expected;
  // Ids of the workers that are attached now. Takes a lock; others that were attached before count
  // as down.
  void SetWorkers(const std::vector<std::string>& attached);

  void Collect(const std::string& model_name, metrics::Page* page) const;

 private:
  static constexpr size_t kRefusals = 8;
  static constexpr size_t kFailures = 5;

  void CollectRequests(metrics::Page* page) const;
  void CollectEnds(metrics::Page* page) const;
  void CollectPipeline(metrics::Page* page) const;

  std::array<metrics::Counter, 3> finished_;   // By EndReason
  std::array<metrics::Counter, 3> cancelled_;  // By RequestPhase
  std::array<metrics::Counter, kRefusals> refused_;
  std::array<metrics::Counter, kFailures> failed_;
  mutable std::mutex mutex_;             // Guards what follows
  std::map<std::string, bool> workers_;  // Id -> attached
};

}  // namespace sluice::controller
