#include "services/controller/generate_reactors.h"

#include <algorithm>
#include <utility>

#include "services/controller/answer.h"

namespace sluice::controller {

void CancelHook::Set(std::function<void()> function) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!fired_) {
      function_ = std::move(function);
      return;
    }
  }
  function();
}

void CancelHook::Fire() {
  std::function<void()> function;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    fired_ = true;
    function.swap(function_);
  }
  if (function) {
    function();
  }
}

void UnaryReactor::Begin(const std::string& model, uint32_t n) {
  model_ = model;
  answers_.resize(n);
}

void UnaryReactor::OnMessage(v1::StreamGenerateResponse&& message) {
  request_id_ = message.request_id();
  MergeMessage(std::move(message), &answers_[message.index()]);
}

void UnaryReactor::OnEnd(const absl::Status& status) {
  if (status.ok()) {
    *response_ = ToBytes(Whole());
  }
  Finishing(response_->Length());
  Finish(FinishStatus(context_, status));
}

void UnaryReactor::OnDone() {
  Gone();
  Release();
}

v1::GenerateResponse UnaryReactor::Whole() {
  v1::GenerateResponse response;
  response.set_request_id(request_id_);
  response.set_model(model_);
  v1::Usage* usage = response.mutable_usage();
  for (uint32_t i = 0; i < answers_.size(); ++i) {
    v1::StreamGenerateResponse& answer = answers_[i];
    v1::Choice* choice = response.add_choices();
    choice->set_index(i);
    choice->mutable_text()->swap(*answer.mutable_text());
    choice->mutable_token_ids()->Swap(answer.mutable_token_ids());
    choice->mutable_logprobs()->Swap(answer.mutable_logprobs());
    choice->set_finish_reason(answer.finish_reason());
    if (answer.has_matched_stop()) {
      choice->mutable_matched_stop()->Swap(answer.mutable_matched_stop());
    }
    usage->set_prompt_tokens(answer.usage().prompt_tokens());
    usage->set_completion_tokens(usage->completion_tokens() + answer.usage().completion_tokens());
    if (!response.has_timing() || answer.timing().decode_us() > response.timing().decode_us()) {
      *response.mutable_timing() = answer.timing();
    }
  }
  response.mutable_prompt_token_ids()->Swap(answers_[0].mutable_prompt_token_ids());
  response.mutable_prompt_logprobs()->Swap(answers_[0].mutable_prompt_logprobs());
  return response;
}

void StreamReactor::OnMessage(v1::StreamGenerateResponse&& message) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto same = std::find_if(pending_.begin(), pending_.end(), [&](const auto& waiting) {
      return waiting.index() == message.index();
    });
    if (same != pending_.end()) {
      MergeMessage(std::move(message), &*same);
    } else {
      pending_.push_back(std::move(message));
    }
    if (!TakeNext()) {
      return;
    }
  }
  StartWrite(&current_);
}

void StreamReactor::OnWriteDone(bool ok) {
  bool write = false;
  std::optional<absl::Status> finish;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    writing_ = false;
    WriteEnded();
    broken_ = broken_ || !ok;
    write = TakeNext();
    if (!write && status_.has_value() && !finished_) {
      finished_ = true;
      finish = status_;
    }
  }
  if (write) {
    StartWrite(&current_);
  } else if (finish.has_value()) {
    Finishing(0);
    Finish(FinishStatus(context_, *finish));
  }
}

void StreamReactor::OnEnd(const absl::Status& status) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    status_ = status;
    if (!status.ok()) {
      pending_.clear();  // An error is not delayed by what would not be a whole answer anyway
    }
    if (writing_) {
      return;
    }
    finished_ = true;
  }
  Finishing(0);
  Finish(FinishStatus(context_, status));
}

bool StreamReactor::TakeNext() {
  if (writing_ || broken_ || pending_.empty()) {
    return false;
  }
  current_ = ToBytes(pending_.front());
  pending_.erase(pending_.begin());
  writing_ = true;
  WriteBegan();
  return true;
}

void StreamReactor::OnDone() {
  Gone();
  Release();
}

}  // namespace sluice::controller
