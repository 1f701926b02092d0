// Death of a process, any one, at any moment: no hung client, no half answer passed off as whole,
// service back when the process is back, no orphan when `sluice up` ends.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "tests/e2e/cluster.h"

namespace sluice::e2e {
namespace {

enum class Victim { kLoader, kController, kFirstWorker, kLastWorker };

Process& ProcessOf(Cluster& cluster, Victim victim) {
  switch (victim) {
    case Victim::kLoader:
      return cluster.loader();
    case Victim::kController:
      return cluster.controller();
    case Victim::kFirstWorker:
      return cluster.worker(0);
    case Victim::kLastWorker:
      break;
  }
  return cluster.worker(1);
}

void Restart(Cluster& cluster, Victim victim) {
  if (victim == Victim::kLoader) cluster.StartLoader();
  if (victim == Victim::kController) cluster.StartController();
  if (victim == Victim::kFirstWorker) cluster.StartWorker(0);
  if (victim == Victim::kLastWorker) cluster.StartWorker(1);
}

class KillTest : public ::testing::TestWithParam<Victim> {};

// Eight clients stream without pause; the victim is killed at random moments. Every answer is
// either whole and right, or UNAVAILABLE.
TEST_P(KillTest, ClientsGetAWholeAnswerOrUnavailable) {
  constexpr int kKills = 4;
  Cluster cluster({.model = CheckpointPath("llama-gptq-v1-g128"), .workers = 2});
  ASSERT_TRUE(cluster.WaitReady()) << cluster.Logs();
  const Golden golden = ReadGolden("llama-gptq-v1-g128");
  const Answer whole = cluster.Stream(GreedyRequest(golden.prompt, 64));
  ASSERT_TRUE(whole.status.ok()) << whole.status.error_message();

  std::atomic<bool> stop = false;
  std::atomic<int> good = 0, lost = 0;
  std::vector<std::thread> clients;
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back([&] {
      while (!stop) {
        const Answer answer =
            cluster.Stream(GreedyRequest(golden.prompt, 64), /*deadline_seconds=*/60);
        EXPECT_TRUE(answer.dense);
        if (answer.status.ok()) {
          EXPECT_EQ(answer.ids, whole.ids);
          ++good;
          continue;
        }
        EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::UNAVAILABLE)
            << answer.status.error_message();
        EXPECT_TRUE(std::equal(answer.ids.begin(), answer.ids.end(), whole.ids.begin()));
        ++lost;
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
      }
    });
  }
  std::mt19937 random(1);
  for (int i = 0; i < kKills; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(200 + random() % 400));
    ProcessOf(cluster, GetParam()).Kill();
    Restart(cluster, GetParam());
    ASSERT_TRUE(cluster.WaitReady(60)) << cluster.Logs();
    const Answer after = cluster.Stream(GreedyRequest(golden.prompt, 64));
    EXPECT_TRUE(after.status.ok() || after.status.error_code() == grpc::StatusCode::UNAVAILABLE);
  }
  stop = true;
  for (std::thread& client : clients) client.join();
  // The controller may have said "serving" in the moment before it noticed the last death.
  ASSERT_TRUE(cluster.WaitReady(60)) << cluster.Logs();
  const Answer last = cluster.Stream(GreedyRequest(golden.prompt, 64));
  EXPECT_TRUE(last.status.ok()) << last.status.error_message() << cluster.Logs();
  EXPECT_EQ(last.ids, whole.ids);
  EXPECT_GT(good, 0);
  if (GetParam() != Victim::kLoader) {
    EXPECT_GT(lost, 0);
  }
}

TEST_P(KillTest, DeathWhileLoadingIsSurvived) {
  Cluster cluster({.model = CheckpointPath("opt-fp16"), .workers = 2});
  ProcessOf(cluster, GetParam()).Kill();
  Restart(cluster, GetParam());
  ASSERT_TRUE(cluster.WaitReady(60)) << cluster.Logs();
  const Golden golden = ReadGolden("opt-fp16");
  const Answer answer = cluster.Stream(GreedyRequest(golden.prompt, 8));
  EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_THAT(answer.ids,
              ::testing::ElementsAreArray(golden.greedy.begin(), golden.greedy.begin() + 8));
}

std::string VictimName(const ::testing::TestParamInfo<Victim>& info) {
  constexpr const char* kNames[] = {"Loader", "Controller", "FirstWorker", "LastWorker"};
  return kNames[static_cast<int>(info.param)];
}

INSTANTIATE_TEST_SUITE_P(Victims, KillTest,
                         ::testing::Values(Victim::kLoader, Victim::kController,
                                           Victim::kFirstWorker, Victim::kLastWorker),
                         VictimName);

// A stopped worker (SIGSTOP) is no dead process: its silence must be noticed all the same.
TEST(HungWorkerTest, ClientsOfASilentWorkerEndWithUnavailable) {
  Cluster cluster({.model = CheckpointPath("llama-fp16"), .workers = 2});
  ASSERT_TRUE(cluster.WaitReady()) << cluster.Logs();
  const Golden golden = ReadGolden("llama-fp16");
  cluster.worker(1).Signal(SIGSTOP);
  const Answer answer = cluster.Stream(GreedyRequest(golden.prompt, 64), /*deadline_seconds=*/60);
  EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::UNAVAILABLE)
      << answer.status.error_message();
  cluster.worker(1).Signal(SIGCONT);
  ASSERT_TRUE(cluster.WaitReady(60)) << cluster.Logs();
  const Answer after = cluster.Stream(GreedyRequest(golden.prompt, 8));
  EXPECT_TRUE(after.status.ok()) << after.status.error_message();
}

class UpTest : public ::testing::TestWithParam<int> {};

// Whatever ends `sluice up`, no process of it is left behind.
TEST_P(UpTest, NoOrphan) {
  const std::string name =
      "orphan-test-" + std::to_string(getpid()) + "-" + std::to_string(GetParam());
  const std::string log = testing::TempDir() + name + ".log";
  Process up({std::string(SLUICE_BIN) + "/sluice", "up", "--model", CheckpointPath("llama-fp16"),
              "--workers", "2", "--port", "0", "--admin-port", "0", "--model-name", name},
             log);
  const auto children = [&] {  // The loader, the controller and two workers of this `up`
    std::vector<pid_t> found;
    for (pid_t pid : ProcessesWith("sluice-")) {
      std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
      std::string skip;
      pid_t parent = 0;
      stat >> skip >> skip >> skip >> parent;
      if (parent == up.pid()) found.push_back(pid);
    }
    return found;
  };
  std::vector<pid_t> pids;
  for (int i = 0; i < 3000 && (pids = children()).size() < 4; ++i) {
    ASSERT_TRUE(up.running()) << log;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  ASSERT_EQ(pids.size(), 4u);
  up.Signal(GetParam());
  ASSERT_TRUE(up.Wait(60).has_value());
  const auto alive = [&] {
    return std::any_of(pids.begin(), pids.end(), [](pid_t pid) {
      std::ifstream file("/proc/" + std::to_string(pid) + "/cmdline");
      return file.peek() != std::ifstream::traits_type::eof();
    });
  };
  for (int i = 0; i < 3000 && alive(); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_FALSE(alive());
}

INSTANTIATE_TEST_SUITE_P(Signals, UpTest, ::testing::Values(SIGTERM, SIGINT, SIGKILL));

}  // namespace
}  // namespace sluice::e2e
