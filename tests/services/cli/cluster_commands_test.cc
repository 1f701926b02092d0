#include "services/cli/cluster_commands.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

namespace sluice::cli {
namespace {

using ::testing::Contains;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsSupersetOf;
using ::testing::Not;

constexpr uint64_t kMiB = 1 << 20;
const Resources kMachine = {.cores = 8, .memory_bytes = 10768 * kMiB};

// The value after a flag, or "" when the flag is not there.
std::string ValueOf(const std::vector<std::string>& command, const std::string& flag) {
  for (size_t i = 0; i + 1 < command.size(); ++i) {
    if (command[i] == flag) return command[i + 1];
  }
  return "";
}

TEST(WorkersOf, OneByDefaultWithEverything) {
  const auto workers = WorkersOf(UpOptions(), kMachine);
  ASSERT_TRUE(workers.ok());
  ASSERT_EQ(workers->size(), 1u);
  EXPECT_EQ((*workers)[0].id, "worker-0");
  EXPECT_EQ((*workers)[0].threads, 8);
  EXPECT_EQ((*workers)[0].memory_bytes, 9000 * kMiB);
}

TEST(WorkersOf, PartsAreEqualUnlessMaxMemorySaysMore) {
  UpOptions options;
  options.workers = 2;
  options.max_memory = "1=512MiB";
  const auto workers = WorkersOf(options, kMachine);
  ASSERT_TRUE(workers.ok());
  ASSERT_EQ(workers->size(), 2u);
  EXPECT_EQ((*workers)[0].memory_bytes, 4500 * kMiB);
  EXPECT_EQ((*workers)[1].memory_bytes, 512 * kMiB);
  EXPECT_EQ((*workers)[1].device_index, 1);
  EXPECT_EQ((*workers)[1].threads, 4);
}

TEST(WorkersOf, MaxMemoryAloneSaysHowMany) {
  UpOptions options;
  options.max_memory = "0=1GiB,1=1GiB,2=1GiB";
  EXPECT_EQ(WorkersOf(options, kMachine)->size(), 3u);
}

TEST(WorkersOf, GpusAndACpuBesideThem) {
  UpOptions options;
  options.device = "cuda";
  options.max_memory = "0=70GiB,1=70GiB,cpu=20GiB";
  const auto workers = WorkersOf(options, kMachine);
  ASSERT_TRUE(workers.ok());
  ASSERT_EQ(workers->size(), 3u);
  EXPECT_EQ((*workers)[1].device, "cuda:1");
  EXPECT_EQ((*workers)[1].threads, 0);
  EXPECT_EQ((*workers)[2].device, "cpu");
  EXPECT_EQ((*workers)[2].device_index, -1);
  EXPECT_EQ((*workers)[2].threads, 8);
}

TEST(WorkersOf, ErrorsSayWhatToDo) {
  UpOptions options;
  options.workers = 2;
  options.max_memory = "3=1GiB";
  EXPECT_THAT(std::string(WorkersOf(options, kMachine).status().message()),
              HasSubstr("give --workers 4"));
  options.max_memory = "0=lots";
  EXPECT_THAT(std::string(WorkersOf(options, kMachine).status().message()), HasSubstr("0=lots"));
  options.max_memory = "0=1GiB";
  options.device = "cuda";
  EXPECT_THAT(std::string(WorkersOf(options, kMachine).status().message()),
              HasSubstr("add 1=SIZE"));
}

TEST(Commands, LoaderComesBackWhereItWas) {
  UpOptions options;
  options.model = "/m";
  const ClusterPaths paths = {"/bin-folder", "/run-folder"};
  EXPECT_EQ(ValueOf(LoaderCommand(options, paths, ""), "--listen"), "127.0.0.1:0");
  EXPECT_EQ(ValueOf(LoaderCommand(options, paths, "127.0.0.1:77"), "--listen"), "127.0.0.1:77");
  EXPECT_EQ(LoaderCommand(options, paths, "")[0], "/bin-folder/sluice-loader");
  EXPECT_THAT(LoaderCommand(options, paths, ""), Not(Contains("--revision")));
  options.revision = "v1.0";
  EXPECT_EQ(ValueOf(LoaderCommand(options, paths, ""), "--revision"), "v1.0");
}

TEST(Commands, ControllerGetsWhatTheUserSaid) {
  UpOptions options;
  options.port = 0;
  options.max_model_len = 512;
  options.max_memory = "0=1GiB,1=1GiB";
  const ClusterPaths paths = {"/bin-folder", "/run-folder"};
  const auto command = ControllerCommand(options, paths, "127.0.0.1:5", 2, {});
  EXPECT_EQ(ValueOf(command, "--loader"), "127.0.0.1:5");
  EXPECT_EQ(ValueOf(command, "--listen"), "127.0.0.1:0");
  EXPECT_EQ(ValueOf(command, "--admin-listen"), "127.0.0.1:50052");
  EXPECT_EQ(ValueOf(command, "--workers"), "2");
  EXPECT_EQ(ValueOf(command, "--max-model-len"), "512");
  EXPECT_EQ(ValueOf(command, "--max-memory"), "0=1GiB,1=1GiB");
  EXPECT_THAT(command, Not(Contains("--max-batch-size")));
  const auto again = ControllerCommand(options, paths, "127.0.0.1:5", 2, {"a:1", "b:2", "c:3", ""});
  EXPECT_EQ(ValueOf(again, "--listen"), "a:1");
  EXPECT_EQ(ValueOf(again, "--internal-listen"), "b:2");
  EXPECT_EQ(ValueOf(again, "--admin-listen"), "c:3");
}

// Always there: an address in the environment would be one for all processes.
TEST(Commands, MetricsPortsFollowEachOther) {
  UpOptions options;
  options.max_memory = "0=1GiB,1=1GiB,cpu=1GiB";
  const ClusterPaths paths = {"/p", "/r"};
  const auto ports = [&] {
    std::vector<std::string> found = {
        ValueOf(ControllerCommand(options, paths, "a:1", 1, {}), "--metrics-listen"),
        ValueOf(LoaderCommand(options, paths, ""), "--metrics-listen")};
    const auto workers = WorkersOf(options, kMachine);
    for (const WorkerSpec& worker : workers.value()) {
      const auto command = WorkerCommand(options, paths, worker, "a:1");
      EXPECT_THAT(command, Contains("--metrics-listen"));
      found.push_back(ValueOf(command, "--metrics-listen"));
    }
    return found;
  };
  EXPECT_THAT(ports(), ElementsAre("", "", "", "", ""));
  options.metrics_port = 9400;
  EXPECT_THAT(ports(), ElementsAre("127.0.0.1:9400", "127.0.0.1:9401", "127.0.0.1:9402",
                                   "127.0.0.1:9403", "127.0.0.1:9404"));
  options.metrics_port = 0;
  EXPECT_THAT(ports(), Each("127.0.0.1:0"));
  const auto again = ControllerCommand(options, paths, "a:1", 1, {"", "", "", "d:4"});
  EXPECT_EQ(ValueOf(again, "--metrics-listen"), "d:4");
}

TEST(Commands, Worker) {
  const auto command =
      WorkerCommand(UpOptions(), {"/p", "/r"}, {"worker-1", "cpu", 1, 3, 1234}, "127.0.0.1:9");
  EXPECT_THAT(command, IsSupersetOf({"--worker-id", "worker-1", "--threads", "3", "--memory",
                                     "1234", "--device-index", "--controller", "127.0.0.1:9"}));
  EXPECT_EQ(ValueOf(command, "--unix-socket"), "/r/worker-1.sock");
}

class AddressFileTest : public ::testing::Test {
 protected:
  void Write(const std::string& text) { std::ofstream(path_) << text; }
  ~AddressFileTest() override { unlink(path_.c_str()); }
  std::string path_ = ::testing::TempDir() + "address_" + std::to_string(getpid());
};

TEST_F(AddressFileTest, Loader) {
  EXPECT_EQ(ReadLoaderAddress(path_).status().code(), absl::StatusCode::kNotFound);
  Write("127.0.0.1:4711\n");
  EXPECT_EQ(*ReadLoaderAddress(path_), "127.0.0.1:4711");
  Write("{\"address\": \"127.0.0.1:4712\"}\n");
  EXPECT_EQ(*ReadLoaderAddress(path_), "127.0.0.1:4712");
  Write("{\"port\": 1}");
  EXPECT_EQ(ReadLoaderAddress(path_).status().code(), absl::StatusCode::kInternal);
}

TEST_F(AddressFileTest, Controller) {
  EXPECT_EQ(ReadControllerAddresses(path_).status().code(), absl::StatusCode::kNotFound);
  Write("{\"public\": \"a:1\", \"internal\": \"b:2\", \"admin\": \"c:3\"}");
  const auto addresses = ReadControllerAddresses(path_);
  ASSERT_TRUE(addresses.ok());
  EXPECT_EQ(addresses->public_address, "a:1");
  EXPECT_EQ(addresses->internal_address, "b:2");
  EXPECT_EQ(addresses->admin_address, "c:3");
  EXPECT_EQ(addresses->metrics_address, "");
  Write(R"({"public": "a:1", "internal": "b:2", "admin": "c:3", "metrics": "d:4"})");
  EXPECT_EQ(ReadControllerAddresses(path_)->metrics_address, "d:4");
  Write("{\"public\": \"a:1\"}");
  EXPECT_EQ(ReadControllerAddresses(path_).status().code(), absl::StatusCode::kInternal);
  Write("not json");
  EXPECT_EQ(ReadControllerAddresses(path_).status().code(), absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace sluice::cli
