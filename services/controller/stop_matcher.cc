#include "services/controller/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace sluice::controller {

StopMatcher::StopMatcher(std::vector<std::string> stops, bool include)
    : stops_(std::move(stops)), include_(include) {}

std::string StopMatcher::Add(const std::string& piece) {
  if (!matched_.empty()) {
    return "";
  }
  held_ += piece;
  size_t first = std::string::npos;
  for (const std::string& stop : stops_) {
    const size_t at = held_.find(stop);
    if (at < first || (at == first && at != std::string::npos && stop.size() > matched_.size())) {
      first = at;
      matched_ = stop;
    }
  }
  if (!matched_.empty()) {
    held_.resize(first + (include_ ? matched_.size() : 0));
    return std::exchange(held_, "");
  }
  const size_t shown = held_.size() - HeldBack();
  std::string text = held_.substr(0, shown);
  held_.erase(0, shown);
  return text;
}

std::string StopMatcher::Finish() { return std::exchange(held_, ""); }

// Length of the longest end of the text that is the beginning of a stop string.
size_t StopMatcher::HeldBack() const {
  size_t longest = 0;
  for (const std::string& stop : stops_) {
    for (size_t n = std::min(stop.size() - 1, held_.size()); n > longest; --n) {
      if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) {
        longest = n;
        break;
      }
    }
  }
  return longest;
}

}  // namespace sluice::controller
