// One run of the kill matrix: one fault at one point of one process, under traffic.
#pragma once

#include <string>
#include <vector>

#include "tests/kill_matrix/points.h"
#include "tests/kill_matrix/traffic.h"

namespace sluice::kill_matrix {

struct Case {
  Point point;
  std::string action;       // "kill", "stop" or "term"
  int nth = 1;              // Pass at which it happens
  std::string victim;       // Name of the process: "loader", "controller", "worker-0", "worker-1"
  std::string checkpoint;   // Of tests/testdata
  double stop_seconds = 6;  // Between SIGSTOP and SIGCONT
};

struct Result {
  std::vector<std::string> failures;  // Empty: as it should be
  std::string logs;                   // Last lines of all processes, when something failed
  int whole = 0;                      // Answers
  int lost = 0;                       // Calls that ended with UNAVAILABLE
  int late = 0;                       // Calls that came as the controller ended: CANCELLED
  double longest_call = 0;            // Seconds
  double back = 0;                    // Seconds from restart or SIGCONT to the next whole answer
};

// Starts a cluster of two workers, lets clients stream, waits for the fault, starts the process
// again as Kubernetes would, and checks: no call beyond its deadline, every token right and once,
// service back, no KV block used at idle, and every process ends after SIGTERM with code 0.
Result RunCase(const Case& one, const std::vector<Reference>& references);

}  // namespace sluice::kill_matrix
