#include "services/cli/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace sluice::cli {
namespace {

constexpr int kBarWidth = 24;
constexpr int kStepPercent = 25;  // Off a terminal, one line for each of these

int Percent(uint64_t done, uint64_t total) {
  return total == 0 ? 0 : static_cast<int>(std::min<uint64_t>(100, done * 100 / total));
}

}  // namespace

std::string ProgressBar(int percent) {
  const int full = percent * kBarWidth / 100;
  std::string text =
      absl::StrCat("[", std::string(full, '#'), std::string(kBarWidth - full, ' '), "] ");
  absl::StrAppend(&text, percent < 10 ? "  " : percent < 100 ? " " : "", percent, "%");
  return text;
}

std::string ProgressLine(const v1::GetClusterResponse& cluster, int width) {
  uint64_t done = 0;
  uint64_t total = 0;
  std::string workers;
  for (const v1::Worker& worker : cluster.workers()) {
    if (worker.shard_bytes() == 0) {
      continue;
    }
    done += worker.loaded_bytes();
    total += worker.shard_bytes();
    absl::StrAppend(&workers, workers.empty() ? "" : ", ", worker.worker_id(), " ",
                    Percent(worker.loaded_bytes(), worker.shard_bytes()), "%");
  }
  std::string line =
      total > 0 ? absl::StrCat(ProgressBar(Percent(done, total)), "  ", workers) : cluster.reason();
  if (total > 0 && done >= total && cluster.state() != v1::MODEL_STATE_SERVING) {
    line = absl::StrCat(ProgressBar(100), "  ", cluster.reason());
  }
  if (static_cast<int>(line.size()) > width) {
    line.resize(std::max(width, 0));
  }
  return line;
}

ProgressDisplay::ProgressDisplay(FILE* out) : out_(out), terminal_(isatty(fileno(out)) == 1) {
  winsize size{};
  if (terminal_ && ioctl(fileno(out), TIOCGWINSZ, &size) == 0 && size.ws_col > 20) {
    width_ = size.ws_col - 1;
  }
}

void ProgressDisplay::Show(const std::string& line) {
  if (terminal_) {
    std::fprintf(out_, "\r\033[K%s", line.c_str());
    shown_ = line;
  } else {
    // "[####  ] 37% ..." counts as new with each quarter only.
    const size_t percent = line.find("] ");
    const std::string key =
        percent == std::string::npos
            ? line
            : absl::StrCat("bar ", std::atoi(line.c_str() + percent + 2) / kStepPercent);
    if (key != shown_) {
      std::fprintf(out_, "%s\n", line.c_str());
      shown_ = key;
    }
  }
  std::fflush(out_);
}

void ProgressDisplay::Note(const std::string& line) {
  Clear();
  std::fprintf(out_, "%s\n", line.c_str());
  std::fflush(out_);
}

void ProgressDisplay::Clear() {
  if (terminal_ && !shown_.empty()) {
    std::fprintf(out_, "\r\033[K");
    std::fflush(out_);
    shown_.clear();
  }
}

}  // namespace sluice::cli
