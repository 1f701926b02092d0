#include "services/controller/request_meter.h"

namespace sluice::controller {
namespace {

double Seconds(TimePoint from, TimePoint to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

RequestMeter::RequestMeter(ControllerMetrics* metrics, TimePoint arrival, const RequestSpec& spec)
    : metrics_(metrics),
      arrival_(arrival),
      prompt_tokens_(static_cast<uint32_t>(spec.prompt.size())),
      answers_(spec.n) {
  metrics_->params_n.Observe(spec.n);
  metrics_->params_max_tokens.Observe(spec.max_tokens);
}

void RequestMeter::OnEvent(TimePoint now, const SchedulerEvent& event) {
  switch (event.kind) {
    case SchedulerEvent::Kind::kStarted:
      started_ = now;
      metrics_->queue_seconds.Observe(Seconds(arrival_, now));
      break;
    case SchedulerEvent::Kind::kToken:
      OnToken(now, &answers_[event.choice]);
      break;
    case SchedulerEvent::Kind::kPromptScores:
      break;
    case SchedulerEvent::Kind::kDone:
      OnEnd(now, event.choice, event.reason);
      break;
    case SchedulerEvent::Kind::kFailed:
      metrics_->Failed(event.status);
      break;
  }
}

void RequestMeter::OnToken(TimePoint now, AnswerTimes* answer) {
  if (answer->ended) {
    return;  // Sampled before the scheduler heard of the stop string: no client sees it
  }
  metrics_->generation_tokens.Add();
  if (!has_token_) {
    has_token_ = true;
    metrics_->prompt_tokens.Add(prompt_tokens_);
  }
  if (answer->tokens++ == 0) {
    answer->first = now;
    metrics_->first_token_seconds.Observe(Seconds(arrival_, now));
  } else {
    metrics_->inter_token_seconds.Observe(Seconds(answer->last, now));
  }
  answer->last = now;
}

void RequestMeter::OnEnd(TimePoint now, uint32_t choice, EndReason reason) {
  AnswerTimes& answer = answers_[choice];
  if (answer.ended) {
    return;
  }
  answer.ended = true;
  metrics_->Finished(reason);
  if (reason == EndReason::kCancelled) {
    OnCancelled();
    return;
  }
  metrics_->e2e_seconds.Observe(Seconds(arrival_, now));
  metrics_->inference_seconds.Observe(Seconds(started_, now));
  metrics_->answer_prompt_tokens.Observe(prompt_tokens_);
  metrics_->answer_generation_tokens.Observe(answer.tokens);
  if (answer.tokens == 0) {
    return;
  }
  const double decode = Seconds(answer.first, now);
  metrics_->prefill_seconds.Observe(Seconds(started_, answer.first));
  metrics_->decode_seconds.Observe(decode);
  if (answer.tokens > 1) {
    metrics_->per_output_token_seconds.Observe(decode / (answer.tokens - 1));
  }
}

void RequestMeter::OnDropped(TimePoint now) {
  for (uint32_t choice = 0; choice < answers_.size(); ++choice) {
    OnEnd(now, choice, EndReason::kCancelled);
  }
}

void RequestMeter::OnCancelled() {
  if (cancelled_) {
    return;
  }
  cancelled_ = true;
  metrics_->Cancelled(has_token_                ? RequestPhase::kDecode
                      : started_ == TimePoint{} ? RequestPhase::kQueue
                                                : RequestPhase::kPrefill);
}

}  // namespace sluice::controller
