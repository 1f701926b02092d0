// Bad safetensors files beside a sound config.json.
#include <gtest/gtest.h>
#include <unistd.h>

#include "tests/bad_files/bad_file.h"

namespace sluice::bad_files {
namespace {

using checkpoint::SafetensorsFile;
using checkpoint::TinyModel;

constexpr char kFile[] = "model.safetensors";

std::function<void(const TempDir&)> Safetensors(const std::string& content) {
  return [content](const TempDir& dir) {
    dir.Write("config.json", TinyModel::Llama().config.dump());
    dir.Write(kFile, content);
  };
}

std::function<void(const TempDir&)> Header(const std::string& header, size_t data_bytes = 4) {
  return Safetensors(SafetensorsFile(header, std::string(data_bytes, '\1')));
}

// One tensor "a" with these fields as JSON.
std::function<void(const TempDir&)> Entry(const std::string& dtype, const std::string& shape,
                                          const std::string& offsets, size_t data_bytes = 4) {
  return Header(
      R"({"a":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}",
      data_bytes);
}
std::function<void(const TempDir&)> Shape(const std::string& shape) {
  return Entry(R"("F16")", shape, "[0,4]");
}
std::function<void(const TempDir&)> Offsets(const std::string& offsets, size_t data_bytes = 4) {
  return Entry(R"("F16")", "[2]", offsets, data_bytes);
}

std::string OneEntry(const std::string& name, uint64_t begin, uint64_t end) {
  return "\"" + name + R"(":{"dtype":"F16","shape":[)" + std::to_string((end - begin) / 2) +
         R"(],"data_offsets":[)" + std::to_string(begin) + "," + std::to_string(end) + "]}";
}

// A file of `size` bytes that takes no room on the disk, with `begin` at its start.
std::function<void(const TempDir&)> Sparse(const std::string& begin, uint64_t size) {
  return [=](const TempDir& dir) {
    Safetensors(begin)(dir);
    ASSERT_EQ(truncate((dir.path() + "/" + kFile).c_str(), static_cast<off_t>(size)), 0);
  };
}

std::string LengthOnly(uint64_t length) { return checkpoint::Bytes<uint64_t>({length}); }

std::string Many(size_t count, const std::function<std::string(size_t)>& entry) {
  std::string out = "{";
  for (size_t i = 0; i < count; ++i) out += (i == 0 ? "" : ",") + entry(i);
  return out + "}";
}

TEST(BadFilesTest, SafetensorsShapes) {
  const auto overflow = [](const std::string& shape) {
    return BadFile{"F1", "shape " + shape, Shape(shape), {kFile, "tensor a", "too many elements"}};
  };
  const auto not_whole = [](const std::string& dim) {
    return BadFile{"F1", "dimension " + dim, Shape("[" + dim + "]"), {kFile, "tensor a", "whole"}};
  };
  const auto broken = [](const std::string& dim) {
    return BadFile{"F1", "dimension " + dim, Shape("[" + dim + "]"), {kFile, "out of range"}};
  };
  ExpectRefused(
      "safetensors",
      {
          // safetensors-cpp: the product wraps to 4. llama.cpp CVE-2025-53630, -2026-27940,
          // -2026-33298 are the same class in GGUF.
          overflow("[4194305,4194305,211106198978564]"),
          overflow("[4398046511105,4398046511105]"),
          overflow("[9223372036854775808]"),
          overflow("[18446744073709551615]"),
          overflow("[4611686018427387904]"),
          overflow("[2147483648,2147483648,2]"),
          overflow("[4294967296,4294967296]"),
          overflow("[1,1,1,1,1,1,9223372036854775807,2]"),
          {"F1", "2^62 + 1 halves wrap to 2", Shape("[4611686018427387905]"), {kFile, "tensor a"}},
          {"F1", "0 times 2^63", Shape("[0,9223372036854775808]"), {kFile, "tensor a"}},
          not_whole("-1"),
          not_whole("2.0"),
          not_whole("\"2\""),
          not_whole("null"),
          not_whole("true"),
          not_whole("[2]"),
          not_whole("{}"),
          not_whole("18446744073709551616"),
          not_whole("1e3"),
          broken("1e400"),
          {"F1", "shape null", Shape("null"), {kFile, "tensor a", "shape must be a list"}},
          {"F1", "shape a number", Shape("2"), {kFile, "tensor a", "shape must be a list"}},
          {"F1",
           "shape an object",
           Shape("{\"0\":2}"),
           {kFile, "tensor a", "shape must be a list"}},
          {"F1", "nine dimensions", Shape("[1,1,1,1,1,1,1,1,2]"), {kFile, "at most 8"}},
          {"F2", "larger than its offsets", Shape("[3]"), {kFile, "tensor a", "needs 6 bytes"}},
          {"F2", "smaller than its offsets", Shape("[1]"), {kFile, "tensor a", "needs 2 bytes"}},
          {"F2", "scalar of four bytes", Shape("[]"), {kFile, "tensor a", "needs 2 bytes"}},
      });
}

TEST(BadFilesTest, SafetensorsOffsets) {
  const std::vector<std::string> rule = {kFile, "tensor a", "data_offsets"};
  ExpectRefused(
      "safetensors",
      {
          // Ollama CVE-2026-7482: a tensor past the end of the file.
          {"F2", "ends one past the file", Offsets("[0,4]", 3), {kFile, "ends at byte 4 of 3"}},
          {"F2", "starts past the file", Offsets("[4,8]"), {kFile, "ends at byte 8 of 4"}},
          {"F2",
           "ends at 2^63",
           Offsets("[0,9223372036854775808]"),
           {kFile, "tensor a", "ends at"}},
          {"F2", "ends at 2^64 - 1", Offsets("[0,18446744073709551615]"), {kFile, "ends at"}},
          {"F2",
           "offset plus header wraps",
           Offsets("[18446744073709551608,18446744073709551612]"),
           {kFile, "tensor a"}},
          {"F2", "cut after the header", Offsets("[0,4]", 0), {kFile, "ends at byte 4 of 0"}},
          {"F4", "reversed", Offsets("[4,0]"), rule},
          {"F4", "negative", Offsets("[-4,0]"), rule},
          {"F4", "fractions", Offsets("[0.0,4.0]"), rule},
          {"F4", "strings", Offsets("[\"0\",\"4\"]"), rule},
          {"F4", "one number", Offsets("[4]"), rule},
          {"F4", "three numbers", Offsets("[0,2,4]"), rule},
          {"F4", "none", Offsets("[]"), rule},
          {"F4", "null", Offsets("null"), rule},
          {"F4", "an object", Offsets("{}"), rule},
          {"F4", "not there", Header(R"({"a":{"dtype":"F16","shape":[2]}})"), rule},
          {"F4", "does not start at 0", Offsets("[2,6]", 6), {kFile, "gap or overlap at byte 0"}},
          {"F4", "bytes after the last", Offsets("[0,4]", 5), {kFile, "1 bytes after the last"}},
          {"F4", "no tensors but data", Header("{}", 4), {kFile, "4 bytes after the last"}},
          {"F4",
           "two on one place",
           Header("{" + OneEntry("a", 0, 4) + "," + OneEntry("b", 0, 4) + "}"),
           {kFile, "tensor b", "gap or overlap"}},
          {"F4",
           "overlap by two bytes",
           Header("{" + OneEntry("a", 0, 4) + "," + OneEntry("b", 2, 6) + "}", 6),
           {kFile, "tensor b", "gap or overlap"}},
          {"F4",
           "gap between two",
           Header("{" + OneEntry("a", 0, 4) + "," + OneEntry("b", 6, 10) + "}", 10),
           {kFile, "tensor b", "gap or overlap at byte 4"}},
          {"F4",
           "one inside the other",
           Header("{" + OneEntry("a", 0, 8) + "," + OneEntry("b", 2, 4) + "}", 8),
           {kFile, "tensor b", "gap or overlap"}},
          {"F4",
           "no elements at another's offset",
           Header("{" + OneEntry("a", 0, 0) + "," + OneEntry("b", 0, 4) + "}"),
           {kFile, "tensor b", "shares its offset"}},
          {"F4",
           "no elements in the middle of another",
           Header("{" + OneEntry("a", 0, 4) + "," + OneEntry("z", 2, 2) + "}"),
           {kFile, "tensor z", "gap or overlap"}},
          {"F4",
           "1000 names on one region: a small file, a huge load",
           Header(Many(1000, [](size_t i) { return OneEntry("t" + std::to_string(i), 0, 4); })),
           {kFile, "gap or overlap"}},
      });
}

TEST(BadFilesTest, SafetensorsEntries) {
  const auto dtype = [](const std::string& value) { return Entry(value, "[2]", "[0,4]"); };
  ExpectRefused(
      "safetensors",
      {
          {"F16",
           "dtype not there",
           Header(R"({"a":{"shape":[2],"data_offsets":[0,4]}})"),
           {kFile, "tensor a", "dtype is missing"}},
          {"F16", "dtype a number", dtype("5"), {kFile, "tensor a", "dtype"}},
          {"F16", "dtype null", dtype("null"), {kFile, "tensor a", "dtype"}},
          {"F16", "dtype unknown", dtype("\"F128\""), {kFile, "tensor a", "F128"}, kUnimplemented},
          {"F16",
           "dtype of half a byte",
           dtype("\"F4\""),
           {kFile, "tensor a", "F4"},
           kUnimplemented},
          {"F16", "dtype in small letters", dtype("\"f16\""), {kFile, "f16"}, kUnimplemented},
          {"F16",
           "dtype of 5000 bytes",
           dtype("\"" + std::string(5000, 'F') + "\""),
           {kFile, "tensor a"},
           kUnimplemented},
          {"F16", "entry a list", Header(R"({"a":[]})"), {kFile, "tensor a", "object"}},
          {"F16", "entry null", Header(R"({"a":null})"), {kFile, "tensor a", "object"}},
          {"F3",
           "name of 513 bytes",
           Header("{" + OneEntry(std::string(513, 'n'), 0, 4) + "}"),
           {kFile, "name", "512"}},
          {"F3", "empty name", Header("{" + OneEntry("", 0, 4) + "}"), {kFile, "name", "512"}},
          {"F5",
           "a tensor twice",
           Header("{" + OneEntry("a", 0, 4) + "," + OneEntry("a", 0, 4) + "}"),
           {kFile, "\"a\" appears twice"}},
          {"F5",
           "a field twice",
           Header(R"({"a":{"dtype":"F16","dtype":"F32","shape":[2],"data_offsets":[0,4]}})"),
           {kFile, "\"dtype\" appears twice"}},
          {"F5",
           "a name twice, once escaped",
           Header("{" + OneEntry("a", 0, 4) + "," + OneEntry("\\u0061", 0, 4) + "}"),
           {kFile, "appears twice"}},
          {"F5",
           "metadata twice",
           Header(R"({"__metadata__":{},"__metadata__":{}})", 0),
           {kFile, "appears twice"}},
          {"F5", "metadata a list", Header(R"({"__metadata__":[]})", 0), {kFile, "__metadata__"}},
          {"F5",
           "metadata with a number",
           Header(R"({"__metadata__":{"a":1}})", 0),
           {kFile, "__metadata__ must map strings"}},
          {"F5",
           "metadata nested",
           Header(R"({"__metadata__":{"a":{"b":"c"}}})", 0),
           {kFile, "__metadata__ must map strings"}},
      });
}

// NOLINTNEXTLINE(readability-function-size): a table
TEST(BadFilesTest, SafetensorsHeaders) {
  const std::string nested = std::string(10'000, '[');
  const std::string zeros = [] {
    std::string list = "{\"a\":[0";
    for (int i = 0; i < 3'000'000; ++i) list += ",0";
    return list + "]}";
  }();
  const std::string lists = [] {
    std::string list = "{\"a\":[[]";
    for (int i = 0; i < 1'900'000; ++i) list += ",[]";
    return list + "]}";
  }();
  ExpectRefused(
      "safetensors",
      {
          {"F6", "empty", Safetensors(""), {kFile, "shorter"}},
          {"F6", "seven bytes", Safetensors("1234567"), {kFile, "shorter"}},
          {"F6", "length only", Safetensors(LengthOnly(8)), {kFile, "header of 8 bytes"}},
          {"F6", "header of no bytes", Safetensors(LengthOnly(0)), {kFile, "must start with '{'"}},
          {"F6", "text", Safetensors(std::string(200, 'x')), {kFile, "header of"}},
          {"F6",
           "LFS pointer",
           Safetensors("version https://git-lfs.github.com/spec/v1\noid\n"),
           {kFile, "git lfs pull"}},
          {"F6",
           "HTML of a login page",
           Safetensors("<!DOCTYPE html><html>please sign in</html>"),
           {kFile, "header of"}},
          {"F6",
           "a zip archive by this name",
           Safetensors("PK\3\4" + std::string(100, '\0')),
           {kFile, "header"}},
          {"F6", "header is a list", Header("[]"), {kFile, "must start with '{'"}},
          {"F6", "starts with a space", Header(" {}"), {kFile, "must start with '{'"}},
          {"F6",
           "cut in the header",
           Safetensors(LengthOnly(40) + R"({"a":{"dtype")"),
           {kFile, "header of 40 bytes in a file of"}},
          {"F6", "broken JSON", Header(R"({"a":{"dtype":"F16",)"), {kFile, "broken JSON"}},
          {"F6", "bytes after the object", Header(R"({}{})"), {kFile, "broken JSON"}},
          {"F6", "a byte that is no UTF-8", Header("{\"\xFF\":{}}"), {kFile, "broken JSON"}},
          {"F6", "lone surrogate", Header(R"({"\ud800":{}})"), {kFile, "broken JSON"}},
          {"F6", "NaN", Header(R"({"a":NaN})"), {kFile, "broken JSON"}},
          {"F6", "comment", Header(R"({/* */})"), {kFile, "broken JSON"}},
          {"F6",
           "zero byte in the header",
           Header(std::string("{\"a\"\0:{}}", 9)),
           {kFile, "broken JSON"}},
          {"F3",
           "length of 2^63",
           Safetensors(LengthOnly(1ULL << 63) + "{}"),
           {kFile, "header of 9223372036854775808"}},
          {"F3", "length of 2^64 - 1", Safetensors(LengthOnly(~0ULL) + "{}"), {kFile, "header of"}},
          {"F3",
           "length of 26 MB, and the file has them",
           Sparse(LengthOnly(26'000'000), 27 << 20),
           {kFile, "header of 26000000 bytes"}},
          {"F3",
           "a file of 1 TiB with a header of 25 MB of zeros",
           Sparse(LengthOnly(25'000'000) + "{", 1ULL << 40),
           {kFile, "broken JSON"}},
          {"F3", "10,000 nested lists", Header("{\"a\":" + nested), {kFile, "deeper than 32"}},
          {"F3",
           "33 levels of objects",
           Header([] {
             std::string text;
             for (int i = 0; i < 33; ++i) text += "{\"a\":";
             return text + "1" + std::string(33, '}');
           }()),
           {kFile, "deeper than 32"}},
          {"F3", "3,000,000 zeros", Header(zeros), {kFile, "values"}},
          {"F3", "1,900,000 empty lists", Header(lists), {kFile, "values"}},
          {"F3",
           "1,000,000 names",
           Header(Many(1'000'000, [](size_t i) { return "\"" + std::to_string(i) + "\":{}"; })),
           {kFile, "values"}},
          {"F3",
           "200,000 tensors, the size of the public slow header",
           Header(Many(200'000,
                       [](size_t i) { return OneEntry(std::to_string(i), 2 * i, 2 * i + 2); }),
                  400'000),
           {kFile, "values"}},
          {"F3",
           "a string of 20 MB",
           // NOLINTNEXTLINE(bugprone-string-constructor): the size is the case
           Header("{\"a\":\"" + std::string(20'000'000, 'x') + "\"}"),
           {kFile, "a string of more than"}},
      });
}

}  // namespace
}  // namespace sluice::bad_files
