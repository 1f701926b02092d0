#include "services/cli/perplexity.h"

#include <gtest/gtest.h>

#include <cmath>

namespace sluice::cli {
namespace {

TEST(EvalWindowsTest, ScoreEveryIdButTheFirstOnce) {
  for (size_t count = 2; count < 60; ++count) {
    for (size_t window = 2; window < 20; ++window) {
      for (size_t stride = 1; stride < window; ++stride) {
        size_t next = 1;
        for (const EvalWindow& w : EvalWindows(count, window, stride)) {
          ASSERT_EQ(w.first_scored, next);
          ASSERT_LT(w.begin, w.first_scored) << "a scored id needs context";
          ASSERT_LT(w.first_scored, w.end);
          ASSERT_LE(w.end - w.begin, window);
          next = w.end;
        }
        ASSERT_EQ(next, count);
      }
    }
  }
}

TEST(EvalWindowsTest, LaterWindowsKeepContext) {
  const auto windows = EvalWindows(20, 8, 4);
  ASSERT_EQ(windows.size(), 4u);
  EXPECT_EQ(windows[1].begin, 4u);
  EXPECT_EQ(windows[1].first_scored, 8u);
  EXPECT_EQ(windows[1].end, 12u);
}

TEST(PerplexityTest, OfEvenOddsIsTheirNumber) {
  Perplexity perplexity;
  EXPECT_EQ(perplexity.value(), 0.0);
  for (int i = 0; i < 1000; ++i) perplexity.Add(std::log(1.0 / 50));
  EXPECT_NEAR(perplexity.value(), 50.0, 1e-9);
}

}  // namespace
}  // namespace sluice::cli
