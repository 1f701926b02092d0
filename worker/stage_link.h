// StageLink: where a stage's results go. Hidden states to the next stage (Stage.Link), or, from the
// last stage, tokens to the controller (Controller.Tokens) and, with several stages, to stage 0
// (Stage.Ring). Picks the rung: a Unix socket first, then TCP.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "worker/cancellation.h"
#include "worker/step_loop.h"

namespace sluice::worker {

class StageLink : public StepSink {
 public:
  struct Options {
    uint64_t epoch = 0;
    internal::v1::ShardAssignment assignment;
    std::string controller_address;  // Used when the assignment names none
    DType hidden_dtype = DType::kF32;
    StageMetrics* metrics = nullptr;  // Of this stage; may be nullptr
  };
  // Connects and opens the streams. `on_break` is called, on a thread of the link, when a stream
  // breaks; it must not destroy the link. UNAVAILABLE names the peer that could not be reached;
  // CANCELLED.
  static absl::StatusOr<std::unique_ptr<StageLink>> Open(
      const Options& options, Cancellation* cancellation,
      std::function<void(absl::Status)> on_break);

  // Makes Send() return false and ends the streams; does not wait. Thread-safe. The destructor
  // waits for the threads.
  virtual void Stop() = 0;

  // What carries the hop to the next stage (the ring, from the last one): "unix", "tcp", or ""
  // without a hop.
  virtual std::string transport() const = 0;
};

}  // namespace sluice::worker
