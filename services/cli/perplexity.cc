#include "services/cli/perplexity.h"

#include <algorithm>
#include <cmath>

namespace sluice::cli {

std::vector<EvalWindow> EvalWindows(size_t count, size_t window, size_t stride) {
  std::vector<EvalWindow> windows;
  size_t scored = 1;  // The first id has no context
  for (size_t begin = 0; scored < count; begin += stride) {
    const size_t end = std::min(begin + window, count);
    windows.push_back({begin, scored, end});
    scored = end;
  }
  return windows;
}

double Perplexity::value() const {
  return count_ == 0 ? 0 : std::exp(sum_ / static_cast<double>(count_));
}

}  // namespace sluice::cli
