#include "services/cli/signals.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

namespace sluice::cli {

SignalQueue::SignalQueue() {
  sigset_t signals;
  sigemptyset(&signals);
  for (int number : {SIGINT, SIGTERM, SIGHUP, SIGCHLD}) {
    sigaddset(&signals, number);
  }
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
  fd_ = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
}

SignalQueue::~SignalQueue() { close(fd_); }

int SignalQueue::Wait(std::chrono::milliseconds timeout) {
  pollfd poll_fd{fd_, POLLIN, 0};
  signalfd_siginfo info;
  if (poll(&poll_fd, 1, static_cast<int>(timeout.count())) > 0 &&
      read(fd_, &info, sizeof(info)) == static_cast<ssize_t>(sizeof(info))) {
    return static_cast<int>(info.ssi_signo);
  }
  return 0;
}

}  // namespace sluice::cli
