// LiveRequest: a request on its way through the scheduler, seen from its client: turns the
// scheduler's events into messages with usage and timing. Owned by the controller's loop; one
// thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "proto/sluice/v1/generation.pb.h"
#include "services/controller/answer.h"
#include "services/controller/scheduler.h"

namespace sluice::controller {

// Where the messages of one request go. Called on the loop's thread; must not block. OnEnd comes
// exactly once, as the last call: with OK after the last message of each answer, else with the
// error.
class ResponseSink {
 public:
  virtual ~ResponseSink() = default;
  virtual void OnMessage(v1::StreamGenerateResponse&& message) = 0;
  virtual void OnEnd(const absl::Status& status) = 0;
};

// A request that has been checked and tokenized.
struct GenerationRequest {
  std::string request_id;
  RequestSpec spec;
  OutputSpec output;
  std::shared_ptr<const text::Tokenizer> tokenizer;
  TimePoint arrival;
};

class LiveRequest {
 public:
  // `sink` is called until OnEnd and must live until then.
  LiveRequest(GenerationRequest request, ResponseSink* sink);

  // Takes an event of this request. Returns the answers that a stop string has ended (at most one):
  // the scheduler must end them.
  std::vector<uint32_t> OnEvent(TimePoint now, const SchedulerEvent& event);

  // Ends with an error. UNAVAILABLE says how many tokens were sent.
  void Fail(absl::Status status);

  bool done() const { return sink_ == nullptr; }
  const std::string& request_id() const { return request_.request_id; }
  uint32_t tokens_sent() const { return tokens_sent_; }
  uint32_t num_answers() const { return static_cast<uint32_t>(answers_.size()); }
  const RequestSpec& spec() const { return request_.spec; }
  TimePoint arrival() const { return request_.arrival; }
  TimePoint first_token() const { return first_token_; }

 private:
  bool OnToken(TimePoint now, const SchedulerEvent& event);
  void OnAnswerDone(TimePoint now, uint32_t choice, EndReason reason,
                    v1::StreamGenerateResponse message);

  GenerationRequest request_;
  ResponseSink* sink_;
  std::vector<std::unique_ptr<Answer>> answers_;
  std::vector<v1::PositionLogprobs> prompt_logprobs_;
  uint32_t finished_ = 0;
  uint32_t tokens_sent_ = 0;
  TimePoint started_{};
  TimePoint first_token_{};
};

}  // namespace sluice::controller
