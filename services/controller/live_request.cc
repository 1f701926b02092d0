#include "services/controller/live_request.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "services/rpc/error_details.h"

namespace sluice::controller {
namespace {

uint64_t Micros(TimePoint from, TimePoint to) {
  return to <= from ? 0
                    : static_cast<uint64_t>(
                          std::chrono::duration_cast<std::chrono::microseconds>(to - from).count());
}

}  // namespace

LiveRequest::LiveRequest(GenerationRequest request, ResponseSink* sink)
    : request_(std::move(request)), sink_(sink) {
  for (uint32_t i = 0; i < request_.spec.n; ++i) {
    answers_.push_back(std::make_unique<Answer>(request_.tokenizer.get(), &request_.output, i));
  }
}

std::vector<uint32_t> LiveRequest::OnEvent(TimePoint now, const SchedulerEvent& event) {
  if (done()) {
    return {};
  }
  switch (event.kind) {
    case SchedulerEvent::Kind::kStarted:
      started_ = now;
      break;
    case SchedulerEvent::Kind::kPromptScores:
      for (const internal::v1::SampledToken& token : event.scores.tokens()) {
        prompt_logprobs_.push_back(ToLogprobs(token, *request_.tokenizer));
      }
      break;
    case SchedulerEvent::Kind::kToken:
      if (OnToken(now, event)) {
        return {event.choice};
      }
      break;
    case SchedulerEvent::Kind::kDone:
      if (!answers_[event.choice]->finished()) {
        OnAnswerDone(now, event.choice, event.reason, {});
      }
      break;
    case SchedulerEvent::Kind::kFailed:
      Fail(event.status);
      break;
  }
  return {};
}

bool LiveRequest::OnToken(TimePoint now, const SchedulerEvent& event) {
  Answer& answer = *answers_[event.choice];
  if (answer.finished()) {
    return false;  // Sampled before the scheduler heard of the stop string
  }
  if (first_token_ == TimePoint{}) {
    first_token_ = now;
  }
  v1::StreamGenerateResponse message;
  message.set_request_id(request_.request_id);
  const bool stopped = answer.Add(event.token, event.ends_text, &message);
  ++tokens_sent_;
  if (event.choice == 0 && !prompt_logprobs_.empty()) {
    message.mutable_prompt_logprobs()->Add(prompt_logprobs_.begin(), prompt_logprobs_.end());
    prompt_logprobs_.clear();
  }
  if (stopped) {
    OnAnswerDone(now, event.choice, EndReason::kStop, std::move(message));
  } else {
    sink_->OnMessage(std::move(message));
  }
  return stopped;
}

void LiveRequest::OnAnswerDone(TimePoint now, uint32_t choice, EndReason reason,
                               v1::StreamGenerateResponse message) {
  Answer& answer = *answers_[choice];
  answer.Finish(reason, &message);
  message.set_request_id(request_.request_id);
  v1::Usage* usage = message.mutable_usage();
  usage->set_prompt_tokens(static_cast<uint32_t>(request_.spec.prompt.size()));
  usage->set_completion_tokens(answer.num_tokens());
  v1::Timing* timing = message.mutable_timing();
  const bool started = started_ != TimePoint{};
  const bool has_token = first_token_ != TimePoint{};
  timing->set_queue_us(Micros(request_.arrival, started ? started_ : now));
  if (has_token) {
    timing->set_prefill_us(Micros(started_, first_token_));
    timing->set_time_to_first_token_us(Micros(request_.arrival, first_token_));
    timing->set_decode_us(Micros(first_token_, now));
  }
  sink_->OnMessage(std::move(message));
  if (++finished_ == answers_.size()) {
    std::exchange(sink_, nullptr)->OnEnd(absl::OkStatus());
  }
}

void LiveRequest::Fail(absl::Status status) {
  if (done()) {
    return;
  }
  if (auto info = rpc::GetDetail<google::rpc::ErrorInfo>(status); info.has_value()) {
    (*info->mutable_metadata())["tokens_sent"] = absl::StrCat(tokens_sent_);
    rpc::AttachDetail(*info, &status);
  }
  std::exchange(sink_, nullptr)->OnEnd(status);
}

}  // namespace sluice::controller
