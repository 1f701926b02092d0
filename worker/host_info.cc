#include "worker/host_info.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>

namespace sluice::worker {
namespace {

constexpr uint64_t kNone = std::numeric_limits<uint64_t>::max();

// The number in a file; kNone for "max" or no such file.
uint64_t ReadNumber(const char* path) {
  std::ifstream file(path);
  uint64_t number = 0;
  return file >> number ? number : kNone;
}

uint64_t MemAvailable() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  uint64_t kib = 0;
  while (file >> key >> kib) {
    if (key == "MemAvailable:") {
      return kib * 1024;
    }
    std::getline(file, unit);
  }
  return 0;
}

uint64_t CgroupAvailable() {
  static constexpr const char* kFiles[][2] = {
      {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"},
      {"/sys/fs/cgroup/memory/memory.limit_in_bytes",
       "/sys/fs/cgroup/memory/memory.usage_in_bytes"}};
  for (const auto& [limit_path, used_path] : kFiles) {
    const uint64_t limit = ReadNumber(limit_path);
    const uint64_t used = ReadNumber(used_path);
    if (limit != kNone && used != kNone) {
      return limit > used ? limit - used : 0;
    }
  }
  return kNone;
}

}  // namespace

uint64_t AvailableMemory() { return std::min(MemAvailable(), CgroupAvailable()); }

uint64_t ResidentBytes() {
  std::ifstream file("/proc/self/statm");
  uint64_t size = 0, resident = 0;
  file >> size >> resident;
  return resident * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace sluice::worker
