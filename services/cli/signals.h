// SignalQueue: SIGINT, SIGTERM, SIGHUP and SIGCHLD as things to wait for, on the main thread,
// without a handler.
#pragma once

#include <chrono>

namespace sluice::cli {

class SignalQueue {
 public:
  // Blocks the signals: construct it in main before any thread, so that all threads inherit it.
  SignalQueue();
  SignalQueue(const SignalQueue&) = delete;
  SignalQueue& operator=(const SignalQueue&) = delete;
  ~SignalQueue();

  // The next signal, or 0 when none came within `timeout`.
  int Wait(std::chrono::milliseconds timeout);

 private:
  int fd_ = -1;
};

}  // namespace sluice::cli
