#include "services/cli/resources.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

namespace sluice::cli {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMiB = 1 << 20;

class ResourcesTest : public ::testing::Test {
 protected:
  ResourcesTest() {
    root_ = ::testing::TempDir() + "resources_" + std::to_string(getpid());
    fs::remove_all(root_);
    Write("/proc/meminfo", "MemTotal:       16384000 kB\nMemAvailable:    8192000 kB\n");
  }
  ~ResourcesTest() override { fs::remove_all(root_); }

  void Write(const std::string& path, const std::string& text) {
    fs::create_directories(fs::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }
  void UseV2(const std::string& group) {
    Write("/sys/fs/cgroup/cgroup.controllers", "cpu memory\n");
    Write("/proc/self/cgroup", "0::" + group + "\n");
  }

  std::string root_;
};

TEST_F(ResourcesTest, WithoutCgroupsTheHostCounts) {
  const Resources resources = ReadResources(root_, 6);
  EXPECT_EQ(resources.cores, 6);
  EXPECT_EQ(resources.memory_bytes, 8192000ull * 1024);
}

TEST_F(ResourcesTest, V2LimitsOfTheGroup) {
  UseV2("/work");
  Write("/sys/fs/cgroup/work/cpu.max", "150000 100000\n");
  Write("/sys/fs/cgroup/work/memory.max", "2147483648\n");
  Write("/sys/fs/cgroup/work/memory.stat", "anon 104857600\nfile 999999999\nshmem 1048576\n");
  const Resources resources = ReadResources(root_, 6);
  EXPECT_EQ(resources.cores, 2);  // 1.5, rounded up
  EXPECT_EQ(resources.memory_bytes, 2048 * kMiB - 101 * kMiB);
}

TEST_F(ResourcesTest, V2ParentsCountToo) {
  UseV2("/pod/container");
  Write("/sys/fs/cgroup/pod/memory.max", "1073741824\n");
  Write("/sys/fs/cgroup/pod/cpu.max", "100000 100000\n");
  Write("/sys/fs/cgroup/pod/container/memory.max", "max\n");
  Write("/sys/fs/cgroup/pod/container/cpu.max", "max 100000\n");
  const Resources resources = ReadResources(root_, 6);
  EXPECT_EQ(resources.cores, 1);
  EXPECT_EQ(resources.memory_bytes, 1024 * kMiB);
}

TEST_F(ResourcesTest, V2PathOutsideTheMountFallsBackToItsRoot) {
  UseV2("/../../host/path");
  Write("/sys/fs/cgroup/memory.max", "536870912\n");
  EXPECT_EQ(ReadResources(root_, 6).memory_bytes, 512 * kMiB);
}

TEST_F(ResourcesTest, V1Limits) {
  Write("/proc/self/cgroup", "9:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n1:name=systemd:/\n");
  Write("/sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes", "1073741824\n");
  Write("/sys/fs/cgroup/memory/docker/x/memory.stat", "cache 5\nrss 7\ntotal_rss 73400320\n");
  Write("/sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us", "400000\n");
  Write("/sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us", "100000\n");
  const Resources resources = ReadResources(root_, 6);
  EXPECT_EQ(resources.cores, 4);
  EXPECT_EQ(resources.memory_bytes, (1024 - 70) * kMiB);
}

TEST_F(ResourcesTest, V1WithoutLimits) {
  Write("/proc/self/cgroup", "9:memory:/\n4:cpu:/\n");
  Write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  Write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n");
  Write("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
  const Resources resources = ReadResources(root_, 6);
  EXPECT_EQ(resources.cores, 6);
  EXPECT_EQ(resources.memory_bytes, 8192000ull * 1024);
}

TEST_F(ResourcesTest, BrokenFilesAreNoLimits) {
  UseV2("/work");
  Write("/sys/fs/cgroup/work/cpu.max", "");
  Write("/sys/fs/cgroup/work/memory.max", "lots\n");
  Write("/proc/self/cgroup", "garbage\n");
  EXPECT_EQ(ReadResources(root_, 6).cores, 6);
  fs::remove_all(root_);
  EXPECT_EQ(ReadResources(root_, 3).memory_bytes, 0u);
  EXPECT_EQ(ReadResources(root_, 3).cores, 3);
}

TEST_F(ResourcesTest, MoreMemoryUsedThanAllowedIsNone) {
  UseV2("/work");
  Write("/sys/fs/cgroup/work/memory.max", "1048576\n");
  Write("/sys/fs/cgroup/work/memory.stat", "anon 2097152\n");
  EXPECT_EQ(ReadResources(root_, 6).memory_bytes, 0u);
}

TEST(ShareTest, CoresAndMemoryAreDivided) {
  const WorkerShare share = ShareOf({.cores = 8, .memory_bytes = 10768 * kMiB}, 2);
  EXPECT_EQ(share.threads, 4);
  EXPECT_EQ(share.memory_bytes, 4500 * kMiB);  // (10768 - 768) * 0.9 / 2
}

TEST(ShareTest, NeverNoThreadAndNeverAllMemory) {
  const WorkerShare share = ShareOf({.cores = 2, .memory_bytes = 1000 * kMiB}, 5);
  EXPECT_EQ(share.threads, 1);
  EXPECT_EQ(share.memory_bytes, 135 * kMiB);  // A quarter is kept
  EXPECT_EQ(ShareOf({.cores = 3, .memory_bytes = 0}, 0).threads, 3);
}

TEST(ThisMachineTest, HasSomething) {
  const Resources resources = ThisMachine();
  EXPECT_GE(resources.cores, 1);
  EXPECT_GT(resources.memory_bytes, 0u);
}

}  // namespace
}  // namespace sluice::cli
