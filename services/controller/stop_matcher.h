// StopMatcher: finds stop strings in a text that comes in pieces, also across the borders of
// pieces, and holds back text that may still become one. Pieces and stop strings are whole UTF-8
// characters, so what is shown is too.
#pragma once

#include <string>
#include <vector>

namespace sluice::controller {

class StopMatcher {
 public:
  // `stops`: none empty. `include`: the stop string that matched stays in the text.
  StopMatcher(std::vector<std::string> stops, bool include);

  // Appends a piece and returns what can be shown now. The match that begins first wins, of those
  // the longest. After a match nothing more is shown.
  std::string Add(const std::string& piece);

  // What was held back, when the text ends otherwise.
  std::string Finish();

  // The stop string that was found; empty: none yet.
  const std::string& matched() const { return matched_; }

 private:
  size_t HeldBack() const;

  std::vector<std::string> stops_;
  bool include_;
  std::string held_;  // Shorter than the longest stop string
  std::string matched_;
};

}  // namespace sluice::controller
