// RequestMeter: the times of one accepted request, from its events to the histograms. Owned by the
// controller's loop; one thread; allocates at the start only.
#pragma once

#include <cstdint>
#include <vector>

#include "services/controller/controller_metrics.h"
#include "services/controller/scheduler.h"

namespace sluice::controller {

class RequestMeter {
 public:
  // `metrics` must outlive the meter.
  RequestMeter(ControllerMetrics* metrics, TimePoint arrival, const RequestSpec& spec);

  // Any event of the request.
  void OnEvent(TimePoint now, const SchedulerEvent& event);
  // A stop string has ended an answer: the scheduler's kDone does not follow.
  void OnStopped(TimePoint now, uint32_t choice) { OnEnd(now, choice, EndReason::kStop); }
  // The client has gone.
  void OnDropped(TimePoint now);

 private:
  struct AnswerTimes {
    TimePoint first{};
    TimePoint last{};
    uint32_t tokens = 0;
    bool ended = false;
  };

  void OnToken(TimePoint now, AnswerTimes* answer);
  void OnEnd(TimePoint now, uint32_t choice, EndReason reason);
  void OnCancelled();

  ControllerMetrics* const metrics_;
  const TimePoint arrival_;
  const uint32_t prompt_tokens_;
  std::vector<AnswerTimes> answers_;
  TimePoint started_{};
  bool has_token_ = false;
  bool cancelled_ = false;
};

}  // namespace sluice::controller
