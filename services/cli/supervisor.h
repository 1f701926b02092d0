// Supervisor: starts child processes, restarts those that die, and ends them all, so that none is
// ever left behind: each child is killed by the system when this process ends, however it ends
// (PR_SET_PDEATHSIG with SIGKILL, set before exec).
//
// Everything runs on one thread, the one that constructed it, which must live as long as the
// process (the system counts the end of the starting thread as the end of the parent). Nothing
// blocks but the start of a program.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace sluice::cli {

struct ChildSpec {
  std::string name;
  std::vector<std::string> command;  // command[0] is a path; no shell, no PATH
  std::string log_path;  // Standard output and error are appended; empty: this process's own
  int stop_rank = 0;     // Lower ranks are stopped, and waited for, first
};

struct SupervisorOptions {
  std::chrono::milliseconds first_backoff{200};  // Doubles with each failure in a row
  std::chrono::milliseconds longest_backoff{10000};
  std::chrono::milliseconds settled{10000};  // A child that lived this long has not failed in a row
  std::chrono::milliseconds grace{10000};    // From SIGTERM to SIGKILL
  int most_failures = 10;                    // In a row
};

class Supervisor {
 public:
  using Clock = std::chrono::steady_clock;

  // `on_event` gets one line for people about each death and restart.
  Supervisor(SupervisorOptions options, std::function<void(const std::string&)> on_event);
  Supervisor(const Supervisor&) = delete;
  Supervisor& operator=(const Supervisor&) = delete;
  ~Supervisor();  // Kills and reaps whatever still runs

  // Starts a child in this process's group. INTERNAL names the program that could not be run.
  absl::Status Start(ChildSpec spec);

  // Command of the next restart of that child: a server that must come back on the same port.
  void SetCommand(const std::string& name, std::vector<std::string> command);

  // Before this, a child that exits by itself with a code other than 0 is an error (it cannot
  // start) and not restarted.
  void ExpectToStay() { expect_to_stay_ = true; }

  // Reaps and restarts; call it at least every 100 ms, or on SIGCHLD. ABORTED when a child cannot
  // start or failed too often in a row: its name, how it ended and where its log is.
  absl::Status Tick();

  // Ends the children, rank by rank: SIGTERM, after the grace SIGKILL. Tick() carries it on;
  // nothing is restarted any more.
  void BeginStop();
  // SIGKILL to all at once.
  void KillAll();
  // No child runs.
  bool stopped() const;

  struct Child {
    ChildSpec spec;
    pid_t pid = -1;  // -1: does not run
    int restarts = 0;
    int failures = 0;  // In a row
    Clock::time_point started;
    Clock::time_point restart_at;
    bool terminated = false;  // SIGTERM was sent
  };
  const std::vector<Child>& children() const { return children_; }

 private:
  absl::Status Spawn(Child& child);
  absl::Status OnDeath(Child& child, int wait_status);
  void StopTick();

  const SupervisorOptions options_;
  const std::function<void(const std::string&)> on_event_;
  std::vector<Child> children_;
  bool expect_to_stay_ = false;
  bool stopping_ = false;
  int stop_rank_ = 0;
  Clock::time_point stop_deadline_;
};

// "code 1", "signal 9 (Killed)" from a status of waitpid.
std::string HowItEnded(int wait_status);

}  // namespace sluice::cli
