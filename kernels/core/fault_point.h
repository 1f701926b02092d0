// Fault points: named places in the code at which the kill matrix (tests/kill_matrix) ends or stops
// the process, to see whether the others notice, nobody hangs and no token is wrong.
//
//   SLUICE_FAULT_POINT("worker.after_compute");   // role.what, in the words of the code around it
//
// They exist only in a build with the CMake option SLUICE_FAULT_POINTS; without it the macro is
// nothing, and the name does not reach the program (tests/kill_matrix/release_test.sh). With it,
// the environment chooses one point of the process:
//
//   SLUICE_FAULT=point:action[:nth]   action: kill (SIGKILL), stop (SIGSTOP), term (SIGTERM);
//                                     nth: at which pass through the point, default 1
//
// The signal goes to the process itself, with whatever locks the thread holds. Before it, a line
// "fault_point: POINT" goes to standard error. Thread-safe.
#pragma once

#ifndef SLUICE_FAULT_POINTS

#define SLUICE_FAULT_POINT(name) static_cast<void>(0)

#else

#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace sluice::fault {

struct Choice {
  std::string point;  // Empty: none
  int signal = 0;
  long nth = 1;
};

// Ends the process when SLUICE_FAULT cannot be read: a test that injects nothing proves nothing.
inline Choice ReadChoice() {
  const char* text = std::getenv("SLUICE_FAULT");
  char point[64] = {}, action[8] = {};
  long nth = 1;
  if (text == nullptr || *text == '\0') {
    return {};
  }
  const int parts = std::sscanf(text, "%63[a-z_.]:%7[a-z]:%ld", point, action, &nth);
  const bool kill = std::strcmp(action, "kill") == 0, stop = std::strcmp(action, "stop") == 0;
  if (parts < 2 || nth < 1 || !(kill || stop || std::strcmp(action, "term") == 0)) {
    std::fprintf(stderr, "SLUICE_FAULT=%s: write point:kill|stop|term[:nth]\n", text);
    std::abort();
  }
  return {point, kill ? SIGKILL : stop ? SIGSTOP : SIGTERM, nth};
}

inline void Pass(const char* point) {
  static const Choice choice = ReadChoice();
  static std::atomic<long> passes{0};
  if (choice.point != point || ++passes != choice.nth) {
    return;
  }
  const std::string line = "fault_point: " + choice.point + "\n";
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, line.data(), line.size());
  kill(getpid(), choice.signal);
}

}  // namespace sluice::fault

#define SLUICE_FAULT_POINT(name) ::sluice::fault::Pass(name)

#endif
