// ClusterTask: what a command does with a cluster of its own, once that serves: `up --once` answers a
// prompt, `eval --model` measures.
#pragma once

#include "absl/status/status.h"
#include "services/cli/cluster_commands.h"

namespace sluice::cli {

class ClusterTask {
 public:
  virtual ~ClusterTask() = default;

  // Called once, on a thread of its own; the cluster stops when it returns. An error becomes the
  // command's.
  virtual absl::Status Run(const ControllerAddresses& addresses) = 0;

  // Makes Run() return soon. From another thread, at any time.
  virtual void Cancel() = 0;
};

}  // namespace sluice::cli
