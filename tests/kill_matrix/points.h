// The fault points of the programs (SLUICE_FAULT_POINT in their sources), and for each what must be
// going on so that the program passes it.
#pragma once

#include <string>
#include <vector>

namespace sluice::kill_matrix {

enum class Scenario {
  kTraffic,     // The process is started with the fault; it passes the point while the model loads
                // or while clients stream
  kWorkerLoss,  // Then a worker (another than the victim) is killed and started again
  kReload,      // Then the victim is killed and started anew with the fault, and a worker that must
                // pull its layers again
  kSigterm,     // Then the victim gets SIGTERM, and passes the point while it ends
};

struct Point {
  std::string name;  // role.what
  Scenario scenario = Scenario::kTraffic;
  int most_passes = 1;  // The fault comes at a pass in [1, most_passes], chosen by the seed
  int worker = -1;      // Of a worker's point: which of the two passes it; -1: both do
};

const std::vector<Point>& AllPoints();

// "controller", "loader" or "worker".
std::string RoleOf(const Point& point);

}  // namespace sluice::kill_matrix
