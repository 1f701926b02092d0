// Perplexity of a text under a model: exp of the mean negative log-probability of its tokens, each
// with as much context as a sliding window gives it.
//
// As in transformers' documentation ("Perplexity of fixed-length models"): windows of `window` ids
// begin every `stride` ids, and a window scores the ids that no earlier window has scored. Here each
// scored id counts once; the documentation's code weights a window by one id less than it scores,
// which differs in the fourth digit.
#pragma once

#include <cstddef>
#include <vector>

namespace sluice::cli {

// Ids [begin, end) are sent, ids [first_scored, end) are scored.
struct EvalWindow {
  size_t begin = 0;
  size_t first_scored = 0;
  size_t end = 0;
};

// Windows over `count` ids; every id but the first is scored once. REQUIRES: 1 <= stride < window,
// count >= 2.
std::vector<EvalWindow> EvalWindows(size_t count, size_t window, size_t stride);

// Sums in double. A text of many thousand ids loses nothing.
class Perplexity {
 public:
  void Add(double logprob) {
    sum_ -= logprob;
    ++count_;
  }
  size_t count() const { return count_; }
  double value() const;  // 0 when nothing was added

 private:
  double sum_ = 0;
  size_t count_ = 0;
};

}  // namespace sluice::cli
