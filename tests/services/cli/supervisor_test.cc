#include "services/cli/supervisor.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <sstream>
#include <thread>

namespace sluice::cli {
namespace {

using ::testing::HasSubstr;

SupervisorOptions Fast() {
  SupervisorOptions options;
  options.first_backoff = std::chrono::milliseconds(5);
  options.longest_backoff = std::chrono::milliseconds(20);
  options.settled = std::chrono::hours(1);
  options.grace = std::chrono::milliseconds(200);
  options.most_failures = 3;
  return options;
}

// Alive and no zombie.
bool Runs(pid_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string text((std::istreambuf_iterator<char>(file)), {});
  const size_t end = text.rfind(')');
  return end != std::string::npos && text.size() > end + 2 && text[end + 2] != 'Z';
}

// Waits, without a bound of its own: CTest's is the one.
template <typename Condition>
void WaitFor(Condition condition) {
  while (!condition()) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

class SupervisorTest : public ::testing::Test {
 protected:
  void Start(std::vector<std::string> command, int rank = 0) {
    const std::string name = "child-" + std::to_string(supervisor_.children().size());
    ASSERT_TRUE(supervisor_.Start({name, std::move(command), "", rank}).ok());
  }
  void TickUntil(const std::function<bool()>& condition) {
    WaitFor([&] {
      EXPECT_TRUE(supervisor_.Tick().ok());
      return condition();
    });
  }
  const Supervisor::Child& child(int index) const { return supervisor_.children()[index]; }

  std::vector<std::string> events_;
  Supervisor supervisor_{Fast(), [this](const std::string& line) { events_.push_back(line); }};
};

TEST_F(SupervisorTest, RestartsAKilledChild) {
  Start({"/bin/sleep", "1000"});
  const pid_t first = child(0).pid;
  kill(first, SIGKILL);
  TickUntil([&] { return child(0).pid > 0 && child(0).pid != first; });
  EXPECT_EQ(child(0).restarts, 1);
  ASSERT_EQ(events_.size(), 1u);
  EXPECT_THAT(events_[0],
              HasSubstr("child-0 ended with signal 9 (Killed); it starts again in 5 ms"));
}

TEST_F(SupervisorTest, BackoffDoublesUpToItsBound) {
  Start({"/bin/sh", "-c", "kill -9 $$"});
  absl::Status status;
  WaitFor([&] { return !(status = supervisor_.Tick()).ok(); });
  ASSERT_EQ(events_.size(), 3u);
  EXPECT_THAT(events_[0], HasSubstr("in 5 ms"));
  EXPECT_THAT(events_[1], HasSubstr("in 10 ms"));
  EXPECT_THAT(events_[2], HasSubstr("in 20 ms"));
  EXPECT_EQ(status.code(), absl::StatusCode::kAborted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("for the 4th time in a row"));
}

TEST_F(SupervisorTest, AChildThatCannotStartIsAnError) {
  Start({"/bin/sh", "-c", "exit 7"});
  absl::Status status;
  WaitFor([&] { return !(status = supervisor_.Tick()).ok(); });
  EXPECT_THAT(std::string(status.message()), HasSubstr("child-0 ended with code 7"));
  EXPECT_TRUE(events_.empty());
}

TEST_F(SupervisorTest, OnceAllWereReadyAnyEndIsRestarted) {
  supervisor_.ExpectToStay();
  Start({"/bin/sh", "-c", "exit 7"});
  TickUntil([&] { return child(0).restarts >= 2; });
}

TEST_F(SupervisorTest, RestartUsesTheNewCommand) {
  Start({"/bin/sleep", "1000"});
  const std::string file = ::testing::TempDir() + "supervisor_test_" + std::to_string(getpid());
  supervisor_.SetCommand("child-0", {"/bin/sh", "-c", "echo yes > " + file + "; exec sleep 1000"});
  kill(child(0).pid, SIGKILL);
  TickUntil([&] { return std::ifstream(file).good(); });
  unlink(file.c_str());
}

TEST_F(SupervisorTest, UnknownProgramIsNamed) {
  const absl::Status status = supervisor_.Start({"x", {"/no/such/program"}, "", 0});
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_EQ(std::string(status.message()),
            "x: cannot run /no/such/program: No such file or directory");
  EXPECT_TRUE(supervisor_.children().empty());
}

TEST_F(SupervisorTest, StopEndsRankByRank) {
  Start({"/bin/sleep", "1000"}, /*rank=*/1);
  Start({"/bin/sh", "-c", "trap 'sleep 0.05; exit 0' TERM; while :; do sleep 0.01; done"}, 0);
  supervisor_.BeginStop();
  WaitFor([&] {
    EXPECT_TRUE(supervisor_.Tick().ok());
    EXPECT_TRUE(child(0).pid > 0 || child(1).pid < 0) << "rank 1 ended before rank 0";
    return supervisor_.stopped();
  });
  EXPECT_TRUE(events_.empty());
}

TEST_F(SupervisorTest, ChildrenThatIgnoreTermOrAreStoppedAreKilled) {
  Start({"/bin/sh", "-c", "trap '' TERM; while :; do sleep 0.01; done"});
  Start({"/bin/sleep", "1000"});
  kill(child(1).pid, SIGSTOP);
  supervisor_.BeginStop();
  TickUntil([&] { return supervisor_.stopped(); });
}

TEST_F(SupervisorTest, ChildrenAreInThisProcessGroupWithCleanSignals) {
  sigset_t blocked;
  sigset_t before;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGTERM);
  sigprocmask(SIG_BLOCK, &blocked, &before);
  Start({"/bin/sleep", "1000"});
  EXPECT_EQ(getpgid(child(0).pid), getpgrp());
  supervisor_.BeginStop();  // Works only if SIGTERM is not blocked in the child, long before the
                            // grace ends
  TickUntil([&] { return supervisor_.stopped(); });
  sigprocmask(SIG_SETMASK, &before, nullptr);
}

TEST_F(SupervisorTest, OutputGoesToTheLog) {
  const std::string log = ::testing::TempDir() + "supervisor_log_" + std::to_string(getpid());
  ASSERT_TRUE(
      supervisor_.Start({"x", {"/bin/sh", "-c", "echo out; echo err >&2; exec sleep 1000"}, log, 0})
          .ok());
  WaitFor([&] {
    std::ifstream file(log);
    return std::string((std::istreambuf_iterator<char>(file)), {}) == "out\nerr\n";
  });
  unlink(log.c_str());
}

TEST_F(SupervisorTest, DestructorLeavesNothing) {
  pid_t pid = 0;
  {
    Supervisor supervisor(Fast(), [](const std::string&) {});
    ASSERT_TRUE(supervisor.Start({"x", {"/bin/sleep", "1000"}, "", 0}).ok());
    pid = supervisor.children()[0].pid;
  }
  EXPECT_FALSE(Runs(pid));
}

// A supervising process of its own, which these tests end in every way there is.
class ParentTest : public ::testing::TestWithParam<int> {
 protected:
  void StartParent(const std::vector<const char*>& arguments) {
    int fds[2];
    ASSERT_EQ(pipe2(fds, O_CLOEXEC), 0);
    std::vector<const char*> argv = {SUPERVISING_PARENT};
    argv.insert(argv.end(), arguments.begin(), arguments.end());
    argv.push_back(nullptr);
    parent_ = fork();
    if (parent_ == 0) {
      dup2(fds[1], STDOUT_FILENO);
      execv(argv[0], const_cast<char* const*>(argv.data()));
      _exit(127);
    }
    close(fds[1]);
    output_ = fdopen(fds[0], "r");
  }
  pid_t NextPid() {
    int pid = -1;
    EXPECT_EQ(std::fscanf(output_, " pid %d", &pid), 1);
    return pid;
  }
  void TearDown() override {
    if (output_ != nullptr) fclose(output_);
  }

  pid_t parent_ = -1;
  FILE* output_ = nullptr;
};

TEST_P(ParentTest, LeavesNoOrphan) {
  // One that obeys, one that ignores SIGTERM, one that is stopped.
  StartParent({"/bin/sleep", "1000", ":", "/bin/sh", "-c",
               "trap '' TERM; while :; do sleep 0.1; done", ":", "/bin/sleep", "1001"});
  const pid_t children[] = {NextPid(), NextPid(), NextPid()};
  for (pid_t child : children) {
    ASSERT_TRUE(Runs(child));
  }
  kill(children[2], SIGSTOP);
  kill(parent_, GetParam());
  int status = 0;
  ASSERT_EQ(waitpid(parent_, &status, 0), parent_);
  for (pid_t child : children) {
    WaitFor([&] { return !Runs(child); });
  }
}

INSTANTIATE_TEST_SUITE_P(Signals, ParentTest,
                         ::testing::Values(SIGKILL, SIGTERM, SIGINT, SIGHUP, SIGSEGV));

TEST_F(ParentTest, RestartedChildrenDieToo) {
  StartParent({"/bin/sleep", "1000"});
  kill(NextPid(), SIGKILL);
  const pid_t second = NextPid();
  kill(parent_, SIGKILL);
  ASSERT_EQ(waitpid(parent_, nullptr, 0), parent_);
  WaitFor([&] { return !Runs(second); });
}

TEST(HowItEndedTest, Words) {
  EXPECT_EQ(HowItEnded(7 << 8), "code 7");
  EXPECT_EQ(HowItEnded(SIGKILL), "signal 9 (Killed)");
}

}  // namespace
}  // namespace sluice::cli
