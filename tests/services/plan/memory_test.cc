#include "services/plan/memory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace sluice::plan {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

TEST(ParseBytesTest, UnitsOfAccelerate) {
  EXPECT_EQ(*ParseBytes("1MiB"), 1048576u);
  EXPECT_EQ(*ParseBytes("10GiB"), 10ull << 30);
  EXPECT_EQ(*ParseBytes("2KiB"), 2048u);
  EXPECT_EQ(*ParseBytes("8GB"), 8000000000u);
  EXPECT_EQ(*ParseBytes("8MB"), 8000000u);
  EXPECT_EQ(*ParseBytes("8KB"), 8000u);
  EXPECT_EQ(*ParseBytes("1.5GiB"), 1610612736u);
  EXPECT_EQ(*ParseBytes("123"), 123u);
  EXPECT_EQ(*ParseBytes(" 5 MiB "), 5u << 20);
}

TEST(ParseBytesTest, CaseIsIgnoredButFinalLowerCaseBMeansBits) {
  EXPECT_EQ(*ParseBytes("1gib"), 1ull << 30);
  EXPECT_EQ(*ParseBytes("1GIb"), 1ull << 30);
  EXPECT_EQ(*ParseBytes("10gB"), 10000000000u);
  EXPECT_EQ(*ParseBytes("10Gb"), 1250000000u);
  EXPECT_EQ(*ParseBytes("10gb"), 1250000000u);
  EXPECT_EQ(*ParseBytes("8kb"), 1000u);
  EXPECT_EQ(*ParseBytes("0.0001KB"), 0u);
}

TEST(ParseBytesTest, RefusesWhatIsNotASize) {
  for (const char* text : {"", "GiB", "-1GiB", "+1GiB", "ten", "1TiB", "1 2GiB", "nan", "inf",
                           "1e30", "0x10", "1GiBB"}) {
    auto bytes = ParseBytes(text);
    EXPECT_EQ(bytes.status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
}

TEST(ParseMaxMemoryTest, ReadsEntries) {
  const MaxMemory memory = *ParseMaxMemory("0=10GiB, 1=8GB ,cpu=30GiB,disk=1KB");
  EXPECT_THAT(memory, ElementsAre(Pair("0", 10ull << 30), Pair("1", 8000000000u),
                                  Pair("cpu", 30ull << 30), Pair("disk", 1000u)));
}

TEST(ParseMaxMemoryTest, OrderIsNumbersThenCpuThenDisk) {
  const Budgets budgets = InOrder(*ParseMaxMemory("disk=1,cpu=2,10=3,2=4,0=5"));
  EXPECT_THAT(budgets, ElementsAre(Pair("0", 5), Pair("2", 4), Pair("10", 3), Pair("cpu", 2),
                                   Pair("disk", 1)));
}

TEST(ParseMaxMemoryTest, ErrorsNameTheEntry) {
  const struct {
    const char* text;
    const char* expected;
  } cases[] = {
      {"0=10GiB,1", "\"1\": expected DEVICE=SIZE"},
      {"tpu=1GiB", "Device tpu is not recognized"},
      {"-1=1GiB", "Device -1 is not recognized"},
      {"00=1GiB", "Device 00 is not recognized"},
      {"0=lots", "\"0=lots\""},
      {"0=1GiB,0=2GiB", "given twice"},
      {"", "expected DEVICE=SIZE"},
  };
  for (const auto& c : cases) {
    auto memory = ParseMaxMemory(c.text);
    ASSERT_EQ(memory.status().code(), absl::StatusCode::kInvalidArgument) << c.text;
    EXPECT_THAT(std::string(memory.status().message()), HasSubstr(c.expected));
  }
}

TEST(ParseMapModeTest, Names) {
  EXPECT_EQ(*ParseMapMode("sequential"), MapMode::kSequential);
  EXPECT_EQ(*ParseMapMode("auto"), MapMode::kAuto);
  EXPECT_EQ(*ParseMapMode("balanced"), MapMode::kAuto);
  EXPECT_EQ(*ParseMapMode("balanced_low_0"), MapMode::kBalancedLow0);
  EXPECT_EQ(*ParseMapMode(" {\"\": 0}"), MapMode::kCustom);
  EXPECT_EQ(*ParseMapMode("cpu"), MapMode::kCustom);
  EXPECT_EQ(*ParseMapMode("cuda:1"), MapMode::kCustom);
  auto wrong = ParseMapMode("automatic");
  ASSERT_FALSE(wrong.ok());
  EXPECT_THAT(std::string(wrong.status().message()),
              HasSubstr("'auto', 'balanced', 'balanced_low_0', 'sequential' but found automatic"));
}

}  // namespace
}  // namespace sluice::plan
