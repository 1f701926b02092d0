// Starts a cluster on this machine and stays with it until it has stopped.
#pragma once

#include "services/cli/cluster_task.h"
#include "services/cli/signals.h"

namespace sluice::cli {

// Until a signal or a failure or, unless it is null, the end of `task`. Writes what happens to standard
// error. The exit code: 0 after a signal or a whole task. From the main thread only; `signals` was made
// before any thread.
int RunCluster(const UpOptions& options, SignalQueue* signals, ClusterTask* task);

}  // namespace sluice::cli
