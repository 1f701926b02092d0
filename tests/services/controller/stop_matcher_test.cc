#include "services/controller/stop_matcher.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

namespace sluice::controller {
namespace {

TEST(StopMatcherTest, ShowsEverythingWithoutStops) {
  StopMatcher matcher({}, false);
  EXPECT_EQ(matcher.Add("abc"), "abc");
  EXPECT_EQ(matcher.Finish(), "");
}

TEST(StopMatcherTest, CutsAtAStopWithinAPiece) {
  StopMatcher matcher({"END"}, false);
  EXPECT_EQ(matcher.Add("one END two"), "one ");
  EXPECT_EQ(matcher.matched(), "END");
  EXPECT_EQ(matcher.Add("three"), "");
}

TEST(StopMatcherTest, FindsAStopAcrossPieces) {
  StopMatcher matcher({"\n\nQ:"}, false);
  EXPECT_EQ(matcher.Add("answer\n"), "answer");
  EXPECT_EQ(matcher.Add("\nQ"), "");
  EXPECT_EQ(matcher.Add(": next"), "");
  EXPECT_EQ(matcher.matched(), "\n\nQ:");
}

TEST(StopMatcherTest, ShowsHeldTextWhenItIsNoStop) {
  StopMatcher matcher({"abcd"}, false);
  EXPECT_EQ(matcher.Add("xab"), "x");
  EXPECT_EQ(matcher.Add("ce"), "abce");
  EXPECT_TRUE(matcher.matched().empty());
}

TEST(StopMatcherTest, HoldsTheOverlapOfARepeatedBeginning) {
  StopMatcher matcher({"aab"}, false);
  EXPECT_EQ(matcher.Add("aa"), "");
  EXPECT_EQ(matcher.Add("a"), "a");  // "aa" may still become "aab"
  EXPECT_EQ(matcher.Add("b"), "");
  EXPECT_EQ(matcher.matched(), "aab");
}

TEST(StopMatcherTest, GivesWhatWasHeldAtTheEnd) {
  StopMatcher matcher({"stop"}, false);
  EXPECT_EQ(matcher.Add("do st"), "do ");
  EXPECT_EQ(matcher.Finish(), "st");
}

TEST(StopMatcherTest, KeepsTheStopWhenAsked) {
  StopMatcher matcher({"."}, true);
  EXPECT_EQ(matcher.Add("Paris. And"), "Paris.");
}

TEST(StopMatcherTest, TheFirstMatchWinsThenTheLongest) {
  StopMatcher matcher({"cd", "b", "bc"}, false);
  EXPECT_EQ(matcher.Add("abcd"), "a");
  EXPECT_EQ(matcher.matched(), "bc");
}

TEST(StopMatcherTest, HoldsWholeCharactersOnly) {
  StopMatcher matcher({"é!"}, false);
  EXPECT_EQ(matcher.Add("è"), "è");
  EXPECT_EQ(matcher.Add("é"), "");
  EXPECT_EQ(matcher.Add("?"), "é?");
}

// Whatever the pieces, the text is the one that a search over the whole gives.
TEST(StopMatcherTest, EqualsASearchOverTheWholeText) {
  std::mt19937 random(11);
  const auto random_text = [&](size_t length) {
    std::string text;
    for (size_t i = 0; i < length; ++i) {
      text += static_cast<char>('a' + random() % 2);
    }
    return text;
  };
  for (int round = 0; round < 20000; ++round) {
    const std::string text = random_text(1 + random() % 24);
    const std::string stop = random_text(1 + random() % 5);
    StopMatcher matcher({stop}, false);
    std::string shown;
    for (size_t at = 0; at < text.size();) {
      const size_t size = 1 + random() % 4;
      shown += matcher.Add(text.substr(at, size));
      at += size;
    }
    shown += matcher.Finish();
    const size_t found = text.find(stop);
    ASSERT_EQ(shown, text.substr(0, found)) << text << " / " << stop;
    ASSERT_EQ(matcher.matched().empty(), found == std::string::npos);
  }
}

}  // namespace
}  // namespace sluice::controller
