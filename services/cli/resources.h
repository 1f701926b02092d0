// What this machine gives to the processes that `sluice up` starts: cores and memory, cut to the
// limits of the cgroup.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sluice::cli {

struct Resources {
  int cores = 1;              // At least 1
  uint64_t memory_bytes = 0;  // Bytes that may still be taken; 0 when nothing is known
};

// Reads /proc and /sys below `root` ("" is the real one; tests give a folder). Cores:
// `affinity_cores`, cut to the CPU quota of this process's cgroup and of its parents, rounded up.
// Memory: MemAvailable, cut to what each of those cgroups leaves, counting as used only memory that
// cannot be reclaimed. cgroup v2 and v1, also when the path in /proc/self/cgroup lies outside the
// mounted tree (a container without a cgroup namespace): then the mount's root counts.
Resources ReadResources(const std::string& root, int affinity_cores);

// Of this process.
Resources ThisMachine();

// The share of each of `workers` equal CPU workers, with a part kept for loader, controller and the
// system.
struct WorkerShare {
  int threads = 1;
  uint64_t memory_bytes = 0;
};
WorkerShare ShareOf(const Resources& resources, int workers);

}  // namespace sluice::cli
