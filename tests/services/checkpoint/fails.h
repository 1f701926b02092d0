// EXPECT_TRUE(Fails(status, code, {"words", ...})): a status of that code whose message holds all
// the words.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "gtest/gtest.h"

namespace sluice::checkpoint {

inline testing::AssertionResult Fails(const absl::Status& status, absl::StatusCode code,
                                      const std::vector<std::string>& words) {
  if (status.code() != code) return testing::AssertionFailure() << status.ToString();
  for (const std::string& word : words) {
    if (std::string(status.message()).find(word) == std::string::npos) {
      return testing::AssertionFailure() << "no \"" << word << "\" in: " << status.ToString();
    }
  }
  return testing::AssertionSuccess();
}

inline testing::AssertionResult Invalid(const absl::Status& status,
                                        const std::vector<std::string>& words) {
  return Fails(status, absl::StatusCode::kInvalidArgument, words);
}

inline testing::AssertionResult Unsupported(const absl::Status& status,
                                            const std::vector<std::string>& words) {
  return Fails(status, absl::StatusCode::kUnimplemented, words);
}

}  // namespace sluice::checkpoint
