#include "services/controller/controller_metrics.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "services/rpc/error_details.h"

namespace sluice::controller {
namespace {

constexpr const char* kFinishedNames[] = {"stop", "length", "abort"};  // By EndReason
constexpr const char* kPhaseNames[] = {"queue", "prefill", "decode"};
constexpr const char* kRefusalNames[] = {"queue_full", "too_large", "not_serving",
                                         "draining",   "deadline",  "request_id_in_use",
                                         "invalid",    "other"};
constexpr const char* kFailureNames[] = {"worker_lost", "draining", "deadline", "internal",
                                         "other"};
// Ids of workers that are gone and still shown: names that change with each start must not add up.
constexpr size_t kMostWorkers = 1024;

// Position of a name; the last one when it is not there.
template <size_t N>
size_t IndexOf(const char* const (&names)[N], const std::string& name) {
  const auto it = std::find(std::begin(names), std::end(names) - 1, name);
  return static_cast<size_t>(it - std::begin(names));
}

bool IsDraining(const absl::Status& status) {
  const auto info = rpc::GetDetail<google::rpc::ErrorInfo>(status);
  return info.has_value() && info->reason() == "DRAINING";
}

const char* RefusalName(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kResourceExhausted:
      // What can succeed later says when.
      return rpc::GetDetail<google::rpc::RetryInfo>(status).has_value() ? "queue_full"
                                                                        : "too_large";
    case absl::StatusCode::kUnavailable:
      return IsDraining(status) ? "draining" : "not_serving";
    case absl::StatusCode::kDeadlineExceeded:
      return "deadline";
    case absl::StatusCode::kAlreadyExists:
      return "request_id_in_use";
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kNotFound:
      return "invalid";
    default:
      return "other";
  }
}

const char* FailureName(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
      return IsDraining(status) ? "draining" : "worker_lost";
    case absl::StatusCode::kDeadlineExceeded:
      return "deadline";
    case absl::StatusCode::kInternal:
      return "internal";
    default:
      return "other";
  }
}

// A counter with one label, a sample for each of its values.
template <size_t N>
void AddByLabel(const std::string& name, const std::string& help, const char* label,
                const char* const (&names)[N], const std::array<metrics::Counter, N>& counters,
                metrics::Page* page) {
  for (size_t i = 0; i < N; ++i) {
    page->AddCounter(name, help, static_cast<double>(counters[i].value()), {{label, names[i]}});
  }
}

}  // namespace

void ControllerMetrics::Refused(const absl::Status& status) {
  refused_[IndexOf(kRefusalNames, RefusalName(status))].Add();
}

void ControllerMetrics::Failed(const absl::Status& status) {
  failed_[IndexOf(kFailureNames, FailureName(status))].Add();
}

void ControllerMetrics::SetWorkers(const std::vector<std::string>& attached) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (workers_.size() > kMostWorkers) {
    workers_.clear();
  }
  for (auto& [id, up] : workers_) {
    up = false;
  }
  for (const std::string& id : attached) {
    workers_[id] = true;
  }
}

void ControllerMetrics::Collect(const std::string& model_name, metrics::Page* page) const {
  CollectPipeline(page);
  page->set_common_labels({{"model_name", model_name}});
  CollectRequests(page);
  CollectEnds(page);
}

void ControllerMetrics::CollectPipeline(metrics::Page* page) const {
  page->AddGauge("sluice_pipeline_epoch", "Number of the current plan.", epoch.value());
  page->AddGauge("sluice_pipeline_serving", "1 while requests are accepted, else 0.",
                 serving.value());
  page->AddCounter("sluice_plans_lost_total",
                   "Plans given up: a worker was lost or faulty, or a step hung.",
                   static_cast<double>(plans_lost.value()));
  page->AddHistogram("sluice_recovery_seconds",
                     "Time from the loss of a plan that served until the next one served.",
                     recovery_seconds);
  page->AddCounter("sluice_steps_total", "Steps sent to the pipeline.",
                   static_cast<double>(steps.value()));
  page->AddGauge("sluice_microbatches_inflight", "Steps sent whose tokens are not back.",
                 steps_in_flight.value());
  page->AddGauge("sluice_workers_expected", "Workers a plan needs.", workers_expected.value());
  std::lock_guard<std::mutex> lock(mutex_);
  size_t attached = 0;
  for (const auto& [id, up] : workers_) {
    attached += up ? 1 : 0;
    page->AddGauge("sluice_worker_up", "1 while the worker is attached, else 0.", up ? 1 : 0,
                   {{"worker", id}});
  }
  page->AddGauge("sluice_workers_attached", "Workers that are attached.",
                 static_cast<double>(attached));
}

void ControllerMetrics::CollectRequests(metrics::Page* page) const {
  page->AddGauge("sluice_num_requests_running", "Answers being generated.",
                 requests_running.value());
  page->AddGauge("sluice_num_requests_waiting", "Requests waiting for room.",
                 requests_waiting.value());
  page->AddGauge("sluice_kv_cache_usage_perc", "KV blocks in use, 1 = all.", kv_usage.value());
  page->AddCounter("sluice_prompt_tokens_total", "Prompt tokens computed.",
                   static_cast<double>(prompt_tokens.value()));
  page->AddCounter("sluice_generation_tokens_total", "Tokens generated.",
                   static_cast<double>(generation_tokens.value()));
  const struct {
    const char* name;
    const char* help;
    const metrics::Histogram* histogram;
  } histograms[] = {
      {"time_to_first_token_seconds", "From arrival to the first token.", &first_token_seconds},
      {"inter_token_latency_seconds", "Between tokens of an answer.", &inter_token_seconds},
      {"request_time_per_output_token_seconds", "Mean time of a token after the first.",
       &per_output_token_seconds},
      {"e2e_request_latency_seconds", "From arrival to the end.", &e2e_seconds},
      {"request_queue_time_seconds", "From arrival to the first step.", &queue_seconds},
      {"request_inference_time_seconds", "From the first step to the end.", &inference_seconds},
      {"request_prefill_time_seconds", "From the first step to the first token.", &prefill_seconds},
      {"request_decode_time_seconds", "From the first token to the end.", &decode_seconds},
      {"request_prompt_tokens", "Prompt tokens of a finished answer.", &answer_prompt_tokens},
      {"request_generation_tokens", "Tokens of a finished answer.", &answer_generation_tokens},
      {"request_params_n", "Answers that a request asks for.", &params_n},
      {"request_params_max_tokens", "max_tokens of a request.", &params_max_tokens},
      {"iteration_tokens", "Tokens, of prompts and of answers, computed in a step.", &step_tokens},
  };
  for (const auto& [name, help, histogram] : histograms) {
    page->AddHistogram(absl::StrCat("sluice_", name), help, *histogram);
  }
}

void ControllerMetrics::CollectEnds(metrics::Page* page) const {
  AddByLabel("sluice_request_success_total", "Answers that ended, by why.", "finished_reason",
             kFinishedNames, finished_, page);
  AddByLabel("sluice_cancelled_requests_total",
             "Requests given up by clients, by how far they were.", "where", kPhaseNames,
             cancelled_, page);
  AddByLabel("sluice_rejected_requests_total", "Requests not accepted, by why.", "reason",
             kRefusalNames, refused_, page);
  AddByLabel("sluice_failed_requests_total", "Accepted requests ended by an error, by why.",
             "reason", kFailureNames, failed_, page);
}

}  // namespace sluice::controller
