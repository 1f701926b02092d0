// Process: a child process of a test. Killed and reaped when it goes out of scope.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

namespace sluice::e2e {

class Process {
 public:
  Process() = default;
  // Starts `command`; standard output and error are appended to `log_path`. A command that cannot
  // be run ends with code 127.
  Process(const std::vector<std::string>& command, const std::string& log_path);
  Process(Process&& other) noexcept { *this = std::move(other); }
  Process& operator=(Process&& other) noexcept;
  ~Process() { Kill(); }

  pid_t pid() const { return pid_; }
  bool running();                        // Reaps it when it has ended
  void Signal(int number);               // Nothing when it has ended
  void Kill();                           // SIGKILL and reap
  std::optional<int> Wait(int seconds);  // Exit code, 128 + signal; nothing when it still runs

 private:
  pid_t pid_ = -1;
  std::optional<int> code_;
};

// Process ids of all live (not zombie) descendants' command lines that contain `text`.
std::vector<pid_t> ProcessesWith(const std::string& text);

}  // namespace sluice::e2e
