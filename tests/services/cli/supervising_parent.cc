// Supervises the commands it is given, as `sluice up` does, and prints their process ids: "pid 123"
// a line, whenever one starts. usage: supervising_parent COMMAND [: COMMAND]...      a COMMAND is a
// path and arguments
#include <signal.h>

#include <cstdio>
#include <set>
#include <string>
#include <vector>

#include "services/cli/signals.h"
#include "services/cli/supervisor.h"

int main(int argc, char** argv) {
  sluice::cli::SignalQueue signals;
  sluice::cli::SupervisorOptions options;
  options.first_backoff = std::chrono::milliseconds(10);
  options.grace = std::chrono::milliseconds(500);
  sluice::cli::Supervisor supervisor(options, [](const std::string&) {});
  std::vector<std::string> command;
  for (int i = 1; i <= argc; ++i) {
    if (i < argc && std::string(argv[i]) != ":") {
      command.push_back(argv[i]);
      continue;
    }
    if (!supervisor.Start({"child", command, "", 0}).ok()) {
      return 2;
    }
    command.clear();
  }
  supervisor.ExpectToStay();
  std::set<pid_t> told;
  bool stopping = false;
  while (!stopping || !supervisor.stopped()) {
    for (const auto& child : supervisor.children()) {
      if (child.pid > 0 && told.insert(child.pid).second) {
        std::printf("pid %d\n", child.pid);
        std::fflush(stdout);
      }
    }
    const int number = signals.Wait(std::chrono::milliseconds(20));
    if (number != 0 && number != SIGCHLD) {
      stopping = true;
      supervisor.BeginStop();
    }
    if (!supervisor.Tick().ok()) {
      return 3;
    }
  }
  return 0;
}
