#include "services/checkpoint/json.h"

#include <limits>

#include "tests/services/checkpoint/fails.h"

namespace sluice::checkpoint {
namespace {

TEST(JsonTest, ParsesWhatTheLibraryParses) {
  const std::string text = R"({"a":[1,-2,3.5,true,null,"x"],"b":{"c":{}}})";
  EXPECT_EQ(*ParseJsonObject(text, "f"), Json::parse(text));
}

TEST(JsonTest, RefusesBrokenAndOversizedInput) {
  for (const char* text : {"", "{", "[]", "5", "{\"a\":NaN}", "{\"a\":1e400}", "{\"a\":01}",
                           "{\"a\":\"\xFF\"}", "{\"a\":1}x", "{\"a\":\"\\ud800\"}"}) {
    EXPECT_TRUE(Invalid(ParseJsonObject(text, "config.json").status(), {"config.json"})) << text;
  }
  EXPECT_TRUE(
      Invalid(ParseJsonObject(R"({"a":{"b":1,"b":2}})", "f").status(), {"\"b\" appears twice"}));
  EXPECT_TRUE(
      ParseJsonObject("{\"a\":" + std::string(31, '[') + std::string(31, ']') + "}", "f").ok());
  EXPECT_TRUE(Invalid(
      ParseJsonObject("{\"a\":" + std::string(32, '[') + std::string(32, ']') + "}", "f").status(),
      {"deeper than 32"}));
  std::string many = "{\"a\":[0";
  for (int i = 0; i < 2'000'000; ++i) many += ",0";
  EXPECT_TRUE(Invalid(ParseJsonObject(many + "]}", "f").status(), {"values of more than"}));
  EXPECT_TRUE(
      Invalid(ParseJsonObject("{\"a\":\"" + std::string((1 << 20) + 1, 'x') + "\"}", "f").status(),
              {"a string of more than 1048576 bytes"}));
}

// F17
TEST(JsonFieldsTest, ChecksTypeAndRange) {
  const auto uint_status = [](const std::string& value) {
    const Json json = *ParseJsonObject("{\"n\":" + value + "}", "f");
    JsonFields fields(json, "f");
    fields.Uint("n", 1, 1000);
    return fields.status();
  };
  EXPECT_TRUE(uint_status("1").ok());
  EXPECT_TRUE(uint_status("1000").ok());
  for (const char* value : {"0", "1001", "1000000000", "-1", "\"32\"", "1.0", "1e2", "true", "[]",
                            "18446744073709551615", "-9223372036854775808"}) {
    EXPECT_TRUE(Invalid(uint_status(value), {"f: n", "1 to 1000"})) << value;
  }
  EXPECT_TRUE(Invalid(uint_status("null"), {"n is missing"}));
}

TEST(JsonFieldsTest, KeepsTheFirstError) {
  const Json json = {{"a", "x"}, {"b", 5}, {"c", nullptr}};
  JsonFields fields(json, "f");
  EXPECT_EQ(fields.UintOr("c", 1, 2, 7), 7U);
  EXPECT_TRUE(fields.status().ok());
  EXPECT_EQ(fields.BoolOr("b", true), true);
  EXPECT_EQ(fields.DoubleOr("a", 0, 1, 0.5), 0.5);
  EXPECT_TRUE(Invalid(fields.status(), {"f: b must be true or false"}));
}

TEST(JsonFieldsTest, NotANumberIsOutOfEveryRange) {
  const Json json = {{"x", std::numeric_limits<double>::quiet_NaN()}};
  JsonFields fields(json, "f");
  fields.DoubleOr("x", 0, 1, 0);
  EXPECT_TRUE(Invalid(fields.status(), {"from 0 to 1"}));
}

}  // namespace
}  // namespace sluice::checkpoint
