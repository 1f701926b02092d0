// What a worker tells about its host and process, read from /proc and /sys.
#pragma once

#include <cstdint>

namespace sluice::worker {

// Bytes that the process may still take: free memory of the host, cut to what the cgroup leaves.
uint64_t AvailableMemory();

// Resident set of this process, bytes.
uint64_t ResidentBytes();

}  // namespace sluice::worker
