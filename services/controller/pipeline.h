// Pipeline: the way of steps to stage 0. The frames come back through Controller.Tokens.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "proto/sluice/internal/v1/shard.pb.h"

namespace sluice::controller {

// Called from any thread, but not from inside a function of Pipeline.
class PipelineListener {
 public:
  virtual ~PipelineListener() = default;
  virtual void OnPipelineOpen(uint64_t epoch) = 0;
  // Once an Open, unless Close came first.
  virtual void OnPipelineBroken(uint64_t epoch, const absl::Status& status) = 0;
};

// One thread calls it.
class Pipeline {
 public:
  virtual ~Pipeline() = default;
  // Connects to the first address that answers; the listener hears of it. Closes what was open.
  virtual void Open(uint64_t epoch, const std::vector<std::string>& addresses,
                    PipelineListener* listener) = 0;
  // Sends a step; ignored when the stream is not open: the listener hears of that.
  virtual void Send(const internal::v1::StepHeader& step) = 0;
  // The listener hears nothing more.
  virtual void Close() = 0;
};

}  // namespace sluice::controller
