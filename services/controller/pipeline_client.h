// PipelineClient: Pipeline over gRPC: one Stage.Step stream an epoch, on its own channel. Steps are
// written on the caller's thread (no hop to another one); a thread of its own connects and reads
// the acknowledgements, so it sees a break at once.
#pragma once

#include <memory>

#include "services/controller/pipeline.h"

namespace sluice::controller {

class PipelineClient : public Pipeline {
 public:
  PipelineClient();
  ~PipelineClient() override;

  void Open(uint64_t epoch, const std::vector<std::string>& addresses,
            PipelineListener* listener) override;
  void Send(const internal::v1::StepHeader& step) override;
  void Close() override;

 private:
  class Connection;
  std::unique_ptr<Connection> connection_;
};

}  // namespace sluice::controller
