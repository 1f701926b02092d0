#include "services/controller/answer.h"

#include <utility>

namespace sluice::controller {
namespace {

v1::FinishReason ToFinishReason(EndReason reason) {
  switch (reason) {
    case EndReason::kStop:
      return v1::FINISH_REASON_STOP;
    case EndReason::kLength:
      return v1::FINISH_REASON_LENGTH;
    case EndReason::kCancelled:
      return v1::FINISH_REASON_CANCELLED;
  }
  return v1::FINISH_REASON_UNSPECIFIED;
}

}  // namespace

void MergeMessage(v1::StreamGenerateResponse&& next, v1::StreamGenerateResponse* message) {
  message->mutable_text()->append(next.text());
  message->mutable_token_ids()->MergeFrom(next.token_ids());
  message->mutable_logprobs()->MergeFrom(next.logprobs());
  message->mutable_prompt_token_ids()->MergeFrom(next.prompt_token_ids());
  message->mutable_prompt_logprobs()->MergeFrom(next.prompt_logprobs());
  if (next.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) {
    message->set_finish_reason(next.finish_reason());
  }
  if (next.has_matched_stop()) {
    message->mutable_matched_stop()->Swap(next.mutable_matched_stop());
  }
  if (next.has_usage()) {
    message->mutable_usage()->Swap(next.mutable_usage());
  }
  if (next.has_timing()) {
    message->mutable_timing()->Swap(next.mutable_timing());
  }
}

v1::PositionLogprobs ToLogprobs(const internal::v1::SampledToken& token,
                                const text::Tokenizer& tokenizer) {
  v1::PositionLogprobs position;
  position.mutable_chosen()->set_token_id(token.token_id());
  position.mutable_chosen()->set_token(tokenizer.TokenText(token.token_id()));
  position.mutable_chosen()->set_logprob(token.logprob());
  for (const internal::v1::TokenLogprob& candidate : token.top()) {
    v1::TokenLogprob* top = position.add_top();
    top->set_token_id(candidate.token_id());
    top->set_token(tokenizer.TokenText(candidate.token_id()));
    top->set_logprob(candidate.logprob());
  }
  return position;
}

Answer::Answer(const text::Tokenizer* tokenizer, const OutputSpec* spec, uint32_t index)
    : tokenizer_(tokenizer),
      spec_(spec),
      index_(index),
      decoder_(tokenizer, spec->skip_special_tokens),
      matcher_(spec->stop, spec->include_stop) {}

bool Answer::Add(const internal::v1::SampledToken& token, bool ends_text,
                 v1::StreamGenerateResponse* message) {
  message->set_index(index_);
  message->set_token_index(num_tokens_);
  if (num_tokens_ == 0) {
    message->set_text(spec_->echo_text);
    message->mutable_prompt_token_ids()->Add(spec_->echo_ids.begin(), spec_->echo_ids.end());
  }
  ++num_tokens_;
  message->add_token_ids(token.token_id());
  if (spec_->num_logprobs >= 0) {
    *message->add_logprobs() = ToLogprobs(token, *tokenizer_);
  }
  if (ends_text) {
    message->mutable_matched_stop()->set_token_id(token.token_id());
    if (!spec_->include_stop) {
      return false;
    }
  }
  std::string piece = decoder_.Add(token.token_id());
  if (num_tokens_ <= spec_->min_tokens) {
    message->mutable_text()->append(piece);
    return false;
  }
  message->mutable_text()->append(matcher_.Add(piece));
  if (matcher_.matched().empty()) {
    return false;
  }
  message->mutable_matched_stop()->set_text(matcher_.matched());
  return true;
}

void Answer::Finish(EndReason reason, v1::StreamGenerateResponse* message) {
  if (message->token_ids().empty()) {
    message->set_index(index_);
    message->set_token_index(num_tokens_);
  }
  finished_ = true;
  message->set_finish_reason(ToFinishReason(reason));
  if (!matcher_.matched().empty()) {
    return;
  }
  // The bytes of a character that never became whole may complete a stop string: then it ends
  // there.
  message->mutable_text()->append(matcher_.Add(decoder_.Finish()));
  message->mutable_text()->append(matcher_.Finish());
}

}  // namespace sluice::controller
