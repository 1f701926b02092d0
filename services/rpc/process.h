// What every process of Sluice does about signals and about the process that started it.
#pragma once

#include <functional>
#include <string>
#include <thread>

#include "absl/status/status.h"

namespace sluice::rpc {

// Turns SIGTERM and SIGINT into calls of a function on the watcher's own thread, so that it may
// lock and wait. Make it in main() before anything starts a thread: threads inherit the blocked
// signals.
class SignalWatcher {
 public:
  // `on_signal` gets the signal's number, once for each signal.
  explicit SignalWatcher(std::function<void(int)> on_signal);
  SignalWatcher(const SignalWatcher&) = delete;
  SignalWatcher& operator=(const SignalWatcher&) = delete;
  // Signals stay blocked: a process that is ending already must not be ended twice.
  ~SignalWatcher();

 private:
  void Watch();

  std::function<void(int)> on_signal_;
  int signal_fd_ = -1;
  int stop_fd_ = -1;
  std::thread thread_;
};

// Asks the system for SIGTERM when the parent process ends (to be exact, the thread that started
// this one: start children from a thread that lives as long as the process). `parent_pid` is the
// parent as the program saw it first (getppid() at the start of main, or a number the parent gave).
// FAILED_PRECONDITION when the parent has gone already: exit then.
absl::Status DieWithParent(int parent_pid);

// Equal for processes that see the same files, so that a Unix socket of one is there for the other:
// the boot id of the host (its name where there is none) and the mount namespace, which differs
// between the pods of one node.
std::string HostId();

}  // namespace sluice::rpc
