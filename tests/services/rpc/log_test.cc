// Log lines are JSON whatever a field holds.
#include "services/rpc/log.h"

#include <gtest/gtest.h>

#include <limits>
#include <nlohmann/json.hpp>
#include <string>

namespace sluice::rpc {
namespace {

TEST(Log, LineIsOneJsonObject) {
  ASSERT_TRUE(InitLog("worker", "info").ok());
  const std::string line = FormatLogLine("2026-11-25T00:00:00Z", "info", "event_name",
                                         {{"request_id", "r-1"},
                                          {"epoch", uint64_t{18446744073709551615u}},
                                          {"ready", true},
                                          {"busy", 0.25},
                                          {"bad", std::numeric_limits<double>::quiet_NaN()},
                                          {"error", absl::NotFoundError("no \"x\"")}});
  const auto json = nlohmann::json::parse(line);
  EXPECT_EQ(json["ts"], "2026-11-25T00:00:00Z");
  EXPECT_EQ(json["level"], "info");
  EXPECT_EQ(json["program"], "worker");
  EXPECT_EQ(json["event"], "event_name");
  EXPECT_EQ(json["request_id"], "r-1");
  EXPECT_EQ(json["epoch"], uint64_t{18446744073709551615u});
  EXPECT_EQ(json["ready"], true);
  EXPECT_EQ(json["busy"], 0.25);
  EXPECT_TRUE(json["bad"].is_null());
  EXPECT_EQ(json["error"], "NOT_FOUND: no \"x\"");
  EXPECT_EQ(line.find('\n'), std::string::npos);
}

TEST(Log, EscapesEveryByte) {
  std::string all;
  for (int c = 0; c < 256; ++c) {
    all.push_back(static_cast<char>(c));
  }
  const std::string quoted = LogField::Quote(all);
  const std::string back = nlohmann::json::parse(quoted).get<std::string>();
  EXPECT_EQ(back.substr(0, 128), all.substr(0, 128));
  EXPECT_EQ(quoted.find('\n'), std::string::npos);
}

TEST(Log, KeepsUtf8AndReplacesTheRest) {
  EXPECT_EQ(LogField::Quote("\u00e9\u20ac\U0001f600"), "\"\u00e9\u20ac\U0001f600\"");
  for (const char* bad : {"\x80", "\xc3", "\xe2\x82", "\xf0\x9f\x98", "\xed\xa0\x80", "\xc0\xaf",
                          "\xf5\x80\x80\x80"}) {
    const std::string quoted = LogField::Quote(bad);
    EXPECT_NE(quoted.find("\xEF\xBF\xBD"), std::string::npos);
    EXPECT_NO_THROW(nlohmann::json::parse(quoted));
  }
}

TEST(Log, RefusesUnknownLevels) {
  EXPECT_EQ(InitLog("x", "loud").code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace sluice::rpc
