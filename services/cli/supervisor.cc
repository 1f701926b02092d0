#include "services/cli/supervisor.h"

#include <fcntl.h>
#include <linux/close_range.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

namespace sluice::cli {
namespace {

// Prepared before fork: after it, only async-signal-safe calls are allowed (other threads may hold
// locks).
struct Prepared {
  std::vector<char*> argv;
  int log_fd = -1;  // -1: keep ours
  int null_fd = -1;
  int error_fd = -1;  // Close-on-exec; gets errno when exec fails
  pid_t parent = 0;
};

[[noreturn]] void RunChild(const Prepared& prepared) {
  // SIGKILL and not SIGTERM: a child that hangs or is stopped must go as well.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != prepared.parent) {
    _exit(0);  // The parent died between fork and prctl
  }
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  signal(SIGPIPE, SIG_DFL);
  dup2(prepared.null_fd, STDIN_FILENO);
  if (prepared.log_fd >= 0) {
    dup2(prepared.log_fd, STDOUT_FILENO);
    dup2(prepared.log_fd, STDERR_FILENO);
  }
  syscall(SYS_close_range, 3u, UINT_MAX, CLOSE_RANGE_CLOEXEC);
  execv(prepared.argv[0], prepared.argv.data());
  const int error = errno;
  [[maybe_unused]] const ssize_t written = write(prepared.error_fd, &error, sizeof(error));
  _exit(127);
}

}  // namespace

std::string HowItEnded(int wait_status) {
  if (WIFSIGNALED(wait_status)) {
    const int number = WTERMSIG(wait_status);
    const char* text = strsignal(number);
    return absl::StrCat("signal ", number, " (", text == nullptr ? "unknown" : text, ")");
  }
  return absl::StrCat("code ", WEXITSTATUS(wait_status));
}

Supervisor::Supervisor(SupervisorOptions options, std::function<void(const std::string&)> on_event)
    : options_(options), on_event_(std::move(on_event)) {}

Supervisor::~Supervisor() {
  KillAll();
  for (Child& child : children_) {
    if (child.pid > 0) {
      waitpid(child.pid, nullptr, 0);
    }
  }
}

absl::Status Supervisor::Start(ChildSpec spec) {
  Child child;
  child.spec = std::move(spec);
  absl::Status status = Spawn(child);
  if (status.ok()) {
    children_.push_back(std::move(child));
  }
  return status;
}

void Supervisor::SetCommand(const std::string& name, std::vector<std::string> command) {
  for (Child& child : children_) {
    if (child.spec.name == name) {
      child.spec.command = std::move(command);
      return;
    }
  }
}

absl::Status Supervisor::Spawn(Child& child) {
  const ChildSpec& spec = child.spec;
  int pipe_fds[2];
  if (pipe2(pipe_fds, O_CLOEXEC) != 0) {
    return absl::InternalError(absl::StrCat(spec.name, ": no pipe: ", strerror(errno)));
  }
  Prepared prepared;
  prepared.error_fd = pipe_fds[1];
  prepared.parent = getpid();
  prepared.null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
  if (!spec.log_path.empty()) {
    prepared.log_fd = open(spec.log_path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  }
  for (const std::string& argument : spec.command) {
    prepared.argv.push_back(const_cast<char*>(argument.c_str()));
  }
  prepared.argv.push_back(nullptr);
  const pid_t pid = fork();
  if (pid == 0) {
    RunChild(prepared);
  }
  close(pipe_fds[1]);
  int error = pid < 0 ? errno : 0;
  if (pid > 0 && read(pipe_fds[0], &error, sizeof(error)) != sizeof(error)) {
    error = 0;  // Closed by exec
  }
  close(pipe_fds[0]);
  close(prepared.null_fd);
  if (prepared.log_fd >= 0) {
    close(prepared.log_fd);
  }
  if (error != 0) {
    if (pid > 0) {
      waitpid(pid, nullptr, 0);
    }
    return absl::InternalError(
        absl::StrCat(spec.name, ": cannot run ", spec.command[0], ": ", strerror(error)));
  }
  child.pid = pid;
  child.started = Clock::now();
  child.terminated = false;
  return absl::OkStatus();
}

absl::Status Supervisor::OnDeath(Child& child, int wait_status) {
  child.pid = -1;
  if (stopping_) {
    return absl::OkStatus();
  }
  const Clock::time_point now = Clock::now();
  child.failures = now - child.started >= options_.settled ? 1 : child.failures + 1;
  const std::string how = absl::StrCat(child.spec.name, " ended with ", HowItEnded(wait_status));
  const std::string where =
      child.spec.log_path.empty() ? "" : absl::StrCat("; its log: ", child.spec.log_path);
  if (!expect_to_stay_ && WIFEXITED(wait_status) && WEXITSTATUS(wait_status) != 0) {
    return absl::AbortedError(absl::StrCat(how, where));
  }
  if (child.failures > options_.most_failures) {
    return absl::AbortedError(
        absl::StrCat(how, " for the ", child.failures, "th time in a row", where));
  }
  const auto backoff = std::min(options_.longest_backoff,
                                options_.first_backoff * (1 << std::min(child.failures - 1, 20)));
  child.restart_at = now + backoff;
  on_event_(absl::StrCat(how, "; it starts again in ", backoff.count(), " ms"));
  return absl::OkStatus();
}

absl::Status Supervisor::Tick() {
  absl::Status result;
  for (Child& child : children_) {
    int wait_status = 0;
    if (child.pid > 0 && waitpid(child.pid, &wait_status, WNOHANG) == child.pid) {
      result.Update(OnDeath(child, wait_status));
    }
  }
  if (stopping_) {
    StopTick();
    return absl::OkStatus();
  }
  if (!result.ok()) {
    return result;
  }
  for (Child& child : children_) {
    if (child.pid < 0 && Clock::now() >= child.restart_at) {
      absl::Status status = Spawn(child);
      if (!status.ok()) {
        return status;
      }
      ++child.restarts;
    }
  }
  return absl::OkStatus();
}

void Supervisor::BeginStop() {
  if (stopping_) {
    return;
  }
  stopping_ = true;
  stop_rank_ = std::numeric_limits<int>::min();
  StopTick();
}

// Signals the lowest rank that still runs; goes on when it has ended.
void Supervisor::StopTick() {
  int rank = std::numeric_limits<int>::max();
  for (const Child& child : children_) {
    if (child.pid > 0) {
      rank = std::min(rank, child.spec.stop_rank);
    }
  }
  if (rank != stop_rank_) {
    stop_rank_ = rank;
    stop_deadline_ = Clock::now() + options_.grace;
  }
  const bool too_late = Clock::now() >= stop_deadline_;
  for (Child& child : children_) {
    if (child.pid <= 0 || child.spec.stop_rank != rank) {
      continue;
    }
    if (too_late) {
      kill(child.pid, SIGKILL);
    } else if (!child.terminated) {
      kill(child.pid, SIGTERM);
      kill(child.pid, SIGCONT);  // A stopped process takes no SIGTERM
      child.terminated = true;
    }
  }
}

void Supervisor::KillAll() {
  stopping_ = true;
  for (const Child& child : children_) {
    if (child.pid > 0) {
      kill(child.pid, SIGKILL);
    }
  }
}

bool Supervisor::stopped() const {
  return std::all_of(children_.begin(), children_.end(),
                     [](const Child& child) { return child.pid < 0; });
}

}  // namespace sluice::cli
