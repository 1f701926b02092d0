#include "services/cli/resources.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace sluice::cli {
namespace {

// For loader, controller, allocator slack and the system.
constexpr uint64_t kReservedBytes = 768ull << 20;

std::string ReadAll(const std::string& path) {
  std::ifstream file(path);
  std::stringstream content;
  content << file.rdbuf();
  return content.str();
}

// First number of a file; `fallback` when there is none ("max", no file).
int64_t NumberIn(const std::string& path, int64_t fallback) {
  const std::string text = ReadAll(path);
  char* end = nullptr;
  const int64_t number = std::strtoll(text.c_str(), &end, 10);
  return end == text.c_str() ? fallback : number;
}

// Value of a line "key value" of memory.stat, or "key: value kB" of meminfo; 0 when it is not
// there.
uint64_t ValueOf(const std::string& text, const std::string& key) {
  std::istringstream lines(text);
  std::string line;
  while (std::getline(lines, line)) {
    if (line.compare(0, key.size(), key) == 0 && line.size() > key.size() &&
        (line[key.size()] == ' ' || line[key.size()] == ':')) {
      return std::strtoull(line.c_str() + key.size() + 1, nullptr, 10);
    }
  }
  return 0;
}

// Path of this process in the hierarchy of `controller` ("" for v2's one hierarchy); "/" when it is
// not listed.
std::string CgroupPath(const std::string& root, const std::string& controller) {
  std::istringstream lines(ReadAll(root + "/proc/self/cgroup"));
  std::string line;
  while (std::getline(lines, line)) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) {
      continue;
    }
    const std::string names = absl::StrCat(",", line.substr(first + 1, second - first - 1), ",");
    const std::string wanted = absl::StrCat(",", controller, ",");
    if (names == wanted || (!controller.empty() && absl::StrContains(names, wanted))) {
      return line.substr(second + 1);
    }
  }
  return "/";
}

// Folders from the process's own cgroup up to the mount's root. Folders that are not there simply
// have no files.
std::vector<std::string> CgroupFolders(const std::string& mount, std::string path) {
  std::vector<std::string> folders;
  while (path.size() > 1) {
    folders.push_back(mount + path);
    path = path.substr(0, path.rfind('/'));
  }
  folders.push_back(mount);
  return folders;
}

struct Limits {
  double cores = 1e9;
  uint64_t memory = UINT64_MAX;
};

void TakeMemory(int64_t limit, uint64_t used, Limits& limits) {
  // v1 writes a huge page-rounded number for "no limit".
  if (limit >= 0 && limit < (int64_t{1} << 60)) {
    const uint64_t bytes = static_cast<uint64_t>(limit);
    limits.memory = std::min(limits.memory, bytes > used ? bytes - used : 0);
  }
}

void TakeQuota(int64_t quota, int64_t period, Limits& limits) {
  if (quota > 0 && period > 0) {
    limits.cores = std::min(limits.cores, static_cast<double>(quota) / static_cast<double>(period));
  }
}

Limits LimitsV2(const std::string& root) {
  Limits limits;
  const std::string mount = root + "/sys/fs/cgroup";
  for (const std::string& folder : CgroupFolders(mount, CgroupPath(root, ""))) {
    const std::string stat = ReadAll(folder + "/memory.stat");
    TakeMemory(NumberIn(folder + "/memory.max", -1), ValueOf(stat, "anon") + ValueOf(stat, "shmem"),
               limits);
    std::istringstream cpu(ReadAll(folder + "/cpu.max"));
    int64_t quota = -1, period = 0;
    cpu >> quota >> period;  // "max 100000" leaves both untouched
    TakeQuota(cpu.fail() ? -1 : quota, period, limits);
  }
  return limits;
}

Limits LimitsV1(const std::string& root) {
  Limits limits;
  const std::string mount = root + "/sys/fs/cgroup";
  for (const std::string& folder : CgroupFolders(mount + "/memory", CgroupPath(root, "memory"))) {
    const std::string stat = ReadAll(folder + "/memory.stat");
    TakeMemory(NumberIn(folder + "/memory.limit_in_bytes", -1),
               ValueOf(stat, "total_rss") + ValueOf(stat, "total_shmem"), limits);
  }
  for (const char* name : {"/cpu", "/cpu,cpuacct"}) {
    for (const std::string& folder : CgroupFolders(mount + name, CgroupPath(root, "cpu"))) {
      TakeQuota(NumberIn(folder + "/cpu.cfs_quota_us", -1),
                NumberIn(folder + "/cpu.cfs_period_us", 0), limits);
    }
  }
  return limits;
}

}  // namespace

Resources ReadResources(const std::string& root, int affinity_cores) {
  const bool v2 = std::ifstream(root + "/sys/fs/cgroup/cgroup.controllers").good();
  const Limits limits = v2 ? LimitsV2(root) : LimitsV1(root);
  Resources resources;
  resources.cores = std::max(
      1, std::min(affinity_cores, static_cast<int>(std::ceil(std::min(limits.cores, 65536.0)))));
  const uint64_t available = ValueOf(ReadAll(root + "/proc/meminfo"), "MemAvailable") * 1024;
  resources.memory_bytes = available == 0 ? limits.memory : std::min(available, limits.memory);
  if (resources.memory_bytes == UINT64_MAX) {
    resources.memory_bytes = 0;
  }
  return resources;
}

Resources ThisMachine() {
  cpu_set_t set;
  CPU_ZERO(&set);
  const int cores = sched_getaffinity(0, sizeof(set), &set) == 0
                        ? CPU_COUNT(&set)
                        : static_cast<int>(std::thread::hardware_concurrency());
  return ReadResources("", std::max(1, cores));
}

WorkerShare ShareOf(const Resources& resources, int workers) {
  workers = std::max(1, workers);
  WorkerShare share;
  share.threads = std::max(1, resources.cores / workers);
  const uint64_t reserved = std::min(kReservedBytes, resources.memory_bytes / 4);
  share.memory_bytes = (resources.memory_bytes - reserved) / 10 * 9 / workers;
  return share;
}

}  // namespace sluice::cli
