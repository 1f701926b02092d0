// Bad GGUF files: a tiny Llama with one thing wrong.
#include <gtest/gtest.h>

#include <filesystem>
#include <limits>

#include "tests/bad_files/bad_file.h"

namespace sluice::bad_files {
namespace {

using checkpoint::Bytes;
using checkpoint::GgufBuilder;
using checkpoint::Repeat;

constexpr char kFile[] = "model.gguf";

template <typename T>
std::string Number(T value) {
  return Bytes(std::vector<T>{value});
}
std::string String(const std::string& text) { return Number<uint64_t>(text.size()) + text; }

std::function<void(const TempDir&)> Gguf(const std::string& content) {
  return File(kFile, content);
}
std::function<void(const TempDir&)> With(const std::function<void(GgufBuilder&)>& change) {
  GgufBuilder gguf = GgufBuilder::Llama();
  change(gguf);
  return Gguf(gguf.Build());
}
std::function<void(const TempDir&)> Key(const std::string& key, uint32_t type,
                                        const std::string& value) {
  return With([&](GgufBuilder& g) { g.Raw(key, type, value); });
}
std::function<void(const TempDir&)> Array(uint32_t element, uint64_t count,
                                          const std::string& values) {
  return Key("a", 9, Number(element) + Number(count) + values);
}
std::function<void(const TempDir&)> Tensor(uint32_t type, const std::vector<uint64_t>& dims,
                                           const std::string& data = "") {
  return With([&](GgufBuilder& g) { g.Tensor("x", type, dims, data); });
}
// A header with these counts, and `rest` after it.
std::string Start(uint64_t tensors, uint64_t keys, const std::string& rest) {
  return "GGUF" + Number<uint32_t>(3) + Number(tensors) + Number(keys) + rest;
}
std::string Info(const std::string& name, uint32_t type, uint64_t offset) {
  return String(name) + Number<uint32_t>(1) + Number<uint64_t>(8) + Number(type) + Number(offset);
}

// NOLINTNEXTLINE(readability-function-size): a table
TEST(BadFilesTest, GgufHeaders) {
  const std::string good = GgufBuilder::Llama().Build();
  const auto replaced = [&good](size_t at, const std::string& bytes) {
    std::string file = good;
    return Gguf(file.replace(at, bytes.size(), bytes));
  };
  ExpectRefused(
      "gguf",
      {
          {"F6", "empty", Gguf(""), {kFile, "header ends"}},
          {"F6", "magic only", Gguf("GGUF"), {kFile, "header ends"}},
          {"F6", "another magic", replaced(0, "GGML"), {kFile, "does not begin with GGUF"}},
          {"F6", "text", Gguf(std::string(100, 'x')), {kFile, "does not begin with GGUF"}},
          {"F6",
           "LFS pointer",
           Gguf("version https://git-lfs.github.com/spec/v1\n"),
           {kFile, "git lfs pull"}},
          {"F6", "cut in the counts", Gguf(good.substr(0, 20)), {kFile, "header ends"}},
          {"F6", "cut in the keys", Gguf(good.substr(0, 200)), {kFile}},
          {"F6", "cut in the data", Gguf(good.substr(0, good.size() - 64)), {kFile, "needs"}},
          {"F6",
           "bytes after the data",
           Gguf(good + std::string(64, '\0')),
           {kFile, "after the last tensor"}},
          {"F7",
           "version 0",
           replaced(4, Number<uint32_t>(0)),
           {kFile, "version 0"},
           kUnimplemented},
          {"F7",
           "version 1",
           replaced(4, Number<uint32_t>(1)),
           {kFile, "version 1"},
           kUnimplemented},
          {"F7",
           "version 4",
           replaced(4, Number<uint32_t>(4)),
           {kFile, "version 4"},
           kUnimplemented},
          {"F7",
           "big-endian",
           replaced(4, Number<uint32_t>(0x03000000)),
           {kFile, "big-endian"},
           kUnimplemented},
          // llama.cpp #15711: the tensor count.
          {"F7", "2^63 tensors", replaced(8, Number(uint64_t{1} << 63)), {kFile, "tensors"}},
          {"F7", "2^64 - 1 tensors", replaced(8, Number(~uint64_t{0})), {kFile, "tensors"}},
          {"F7", "100,001 tensors", replaced(8, Number<uint64_t>(100'001)), {kFile, "tensors"}},
          {"F7", "one tensor too many", replaced(8, Number<uint64_t>(12)), {kFile}},
          {"F7", "no tensors but their data", replaced(8, Number<uint64_t>(0)), {kFile}},
          {"F7", "2^63 keys", replaced(16, Number(uint64_t{1} << 63)), {kFile, "keys"}},
          {"F7", "2^64 - 1 keys", replaced(16, Number(~uint64_t{0})), {kFile, "keys"}},
          {"F7", "one key too many", replaced(16, Number<uint64_t>(16)), {kFile}},
          {"F5",
           "a key twice",
           Gguf(Start(0, 2,
                      String("a") + Number(4) + Number(1) + String("a") + Number(4) + Number(2))),
           {kFile, "key a appears twice"}},
          {"F5",
           "a tensor twice",
           Gguf(Start(2, 0, Info("t", 0, 0) + Info("t", 0, 32) + std::string(128, '\0'))),
           {kFile, "tensor t appears twice"}},
      },
      OpenGguf);
}

// llama.cpp #19856: limits of strings and arrays.
// NOLINTNEXTLINE(readability-function-size): a table
TEST(BadFilesTest, GgufKeys) {
  std::vector<BadFile> cases = {
      {"F7", "value type 13", Key("a", 13, ""), {kFile, "value type 13"}},
      {"F7", "value type 2^32 - 1", Key("a", ~0U, ""), {kFile, "value type"}},
      {"F7", "element type 13", Array(13, 1, ""), {kFile, "value type 13"}},
      {"F7",
       "array of arrays",
       Array(9, 1, Number(0) + Number<uint64_t>(0)),
       {kFile, "array of arrays"}},
      {"F7",
       "key of 257 bytes",
       Key(std::string(257, 'k'), 4, Number(1)),
       {kFile, "string of 257"}},
      {"F3",
       "bytes that become eight each",
       Array(0, 5'000'000, std::string(5'000'000, '\1')),
       {kFile, "an array of 5000000"}},
      {"F3",
       "four arrays of 3,900,000 bytes",
       With([](GgufBuilder& g) {
         for (const char* key : {"a", "b", "c", "d"}) {
           g.Raw(key, 9, Number(0) + Number<uint64_t>(3'900'000) + std::string(3'900'000, '\1'));
         }
       }),
       {kFile, "values of more than"}},
      {"F3",
       "3,000,000 empty strings",
       // NOLINTNEXTLINE(bugprone-string-constructor): the size is the case
       Array(8, 3'000'000, std::string(24'000'000, '\0')),
       {kFile, "values of more than"}},
      {"F3",
       "a file of 1 TiB of zero keys",
       [](const TempDir& dir) {
         dir.Write(kFile, Start(0, 100'000, ""));
         std::filesystem::resize_file(dir.path() + "/" + kFile, 1ULL << 40);
       },
       {kFile}},
  };
  for (const uint64_t count : {uint64_t{1} << 63, uint64_t{1} << 40, uint64_t{4'000'001}}) {
    const std::string text = std::to_string(count);
    cases.push_back(
        {"F7", text + " bytes in an array", Array(0, count, ""), {kFile, "an array of"}});
    cases.push_back({"F7", text + " doubles", Array(12, count, ""), {kFile, "an array of"}});
    cases.push_back({"F7", text + " strings", Array(8, count, ""), {kFile, "an array of"}});
    cases.push_back({"F7", "string of " + text, Key("a", 8, Number(count)), {kFile, "string of"}});
  }
  cases.push_back(
      {"F7", "2^61 doubles wrap to 0 bytes", Array(12, 1ULL << 61, ""), {kFile, "an array of"}});
  for (const uint32_t alignment : {0U, 3U, 48U, 131072U, 0x80000000U}) {
    // llama.cpp #24997: alignment 0x80000000.
    cases.push_back({"F7",
                     "alignment " + std::to_string(alignment),
                     With([&](GgufBuilder& g) { g.U32("general.alignment", alignment); }),
                     {kFile, "general.alignment"}});
  }
  cases.push_back({"F7",
                   "alignment a string",
                   With([](GgufBuilder& g) { g.Text("general.alignment", "32"); }),
                   {kFile, "general.alignment"}});
  cases.push_back({"F7",
                   "alignment 64, laid out for 32",
                   With([](GgufBuilder& g) { g.U32("general.alignment", 65536); }),
                   {kFile}});
  ExpectRefused("gguf", cases, OpenGguf);
}

// NOLINTNEXTLINE(readability-function-size): a table
TEST(BadFilesTest, GgufTensors) {
  const uint64_t most = (uint64_t{1} << 31) - 1;
  std::vector<BadFile> cases = {
      {"F1",
       "four dimensions of 2^31 - 1",
       Tensor(0, {most, most, most, most}),
       {kFile, "tensor x", "too many elements"}},
      {"F1", "rows times columns of 2^62", Tensor(0, {most, most}), {kFile, "tensor x"}},
      // CVE-2026-33298: an exabyte tensor in a small file.
      {"F1", "an exabyte", Tensor(0, {most, most / 8}), {kFile, "tensor x"}},
      {"F7", "no dimensions", Tensor(0, {}), {kFile, "0 dimensions"}},
      {"F7", "five dimensions", Tensor(0, {1, 1, 1, 1, 1}), {kFile, "5 dimensions"}},
      {"F7", "31 columns in blocks of 32", Tensor(3, {31, 1}), {kFile, "tensor x", "31 columns"}},
      {"F7",
       "no name",
       With([](GgufBuilder& g) { g.Tensor("", 0, {8}, std::string(32, '\1')); }),
       {kFile, "tensor \"\""}},
      {"F7",
       "name of 513 bytes",
       With([](GgufBuilder& g) { g.Tensor(std::string(513, 'n'), 0, {8}, std::string(32, '\1')); }),
       {kFile, "string of 513"}},
      // Ollama CVE-2026-7482: tensors past the end of the file.
      {"F2",
       "one element past the end",
       With([](GgufBuilder& g) {
         g.Tensor("zz", 0, {32, 8}, std::string(1020, '\1'));
       }),
       {kFile, "tensor zz needs 1024 bytes"}},
      {"F2",
       "offset of 2^63",
       Gguf(Start(1, 0, Info("t", 0, 1ULL << 63) + std::string(128, '\0'))),
       {kFile, "tensor t lies at offset"}},
      {"F2",
       "offset of 2^64 - 32",
       Gguf(Start(1, 0, Info("t", 0, ~31ULL) + std::string(128, '\0'))),
       {kFile, "tensor t lies at offset"}},
      {"F4",
       "two on one place",
       Gguf(Start(2, 0, Info("t", 0, 0) + Info("u", 0, 0) + std::string(128, '\0'))),
       {kFile, "tensor u lies at offset 0"}},
      {"F4",
       "gap",
       Gguf(Start(2, 0, Info("t", 0, 0) + Info("u", 0, 64) + std::string(256, '\0'))),
       {kFile, "tensor u lies at offset 64"}},
      {"F4",
       "in reverse",
       Gguf(Start(2, 0, Info("t", 0, 32) + Info("u", 0, 0) + std::string(128, '\0'))),
       {kFile, "tensor t lies at offset 32"}},
      {"F4",
       "offset that is not aligned",
       Gguf(Start(2, 0, Info("t", 0, 0) + Info("u", 0, 33) + std::string(128, '\0'))),
       {kFile, "tensor u lies at offset 33"}},
  };
  // vLLM CVE-2026-53923: dimensions that are cut to 32 bits.
  for (const uint64_t dim :
       {uint64_t{0}, uint64_t{1} << 31, (uint64_t{1} << 31) + 1, uint64_t{1} << 32,
        (uint64_t{1} << 32) + 1, uint64_t{1} << 63, ~uint64_t{0}}) {
    cases.push_back({dim == 0 ? "F1" : "F8",
                     "dimension " + std::to_string(dim),
                     Tensor(0, {dim, 1}),
                     {kFile, "tensor x", "out of range"}});
  }
  for (const uint32_t type : {4U, 6U, 9U, 12U, 14U, 24U, 28U, 31U, 39U, 1000U, ~0U}) {
    cases.push_back({"F7",
                     "tensor type " + std::to_string(type),
                     Tensor(type, {256}, std::string(1024, '\1')),
                     {kFile, "tensor x", "GGUF type"},
                     kUnimplemented});
  }
  ExpectRefused("gguf", cases, OpenGguf);
}

// llama.cpp #26690: an array that is declared as one type and read as another.
// NOLINTNEXTLINE(readability-function-size): a table
TEST(BadFilesTest, GgufVocabularies) {
  const auto tokens = [](const std::vector<std::string>& list) {
    return With([&](GgufBuilder& g) { g.Texts("tokenizer.ggml.tokens", list); });
  };
  const std::string bytes = Number(0) + Number<uint64_t>(8) + std::string(8, '\1');
  ExpectRefused("gguf",
                {
                    {"F7",
                     "scores declared as bytes",
                     Key("tokenizer.ggml.scores", 9, bytes),
                     {kFile, "tokenizer.ggml.scores", "float32"}},
                    {"F7",
                     "tokens declared as bytes",
                     Key("tokenizer.ggml.tokens", 9, bytes),
                     {kFile, "tokenizer.ggml.tokens", "strings"}},
                    {"F7",
                     "types declared as floats",
                     With([](GgufBuilder& g) {
                       g.Floats("tokenizer.ggml.token_type", {1, 1, 1, 1, 1, 1, 1, 1});
                     }),
                     {kFile, "tokenizer.ggml.token_type", "integers"}},
                    {"F7",
                     "merges declared as one string",
                     With([](GgufBuilder& g) { g.Text("tokenizer.ggml.merges", "a b"); }),
                     {kFile, "tokenizer.ggml.merges", "array of strings"}},
                    {"F21",
                     "no tokens",
                     With([](GgufBuilder& g) { g.RemoveKey("tokenizer.ggml.tokens"); }),
                     {kFile, "tokenizer.ggml.tokens is missing"}},
                    {"F21", "empty list of tokens", tokens({}), {kFile, "holds 0 tokens"}},
                    {"F21",
                     "more tokens than rows",
                     tokens({"a", "b", "c", "d", "e", "f", "g", "h", "i"}),
                     {kFile, "9 tokens for an embedding table of 8"}},
                    {"F21",
                     "fewer types than tokens",
                     With([](GgufBuilder& g) {
                       g.Ints("tokenizer.ggml.token_type", {1, 1});
                     }),
                     {kFile, "token_type holds 2 values for 8"}},
                    {"F21",
                     "fewer scores than tokens",
                     With([](GgufBuilder& g) { g.Floats("tokenizer.ggml.scores", {1}); }),
                     {kFile, "scores holds 1 values for 8"}},
                    {"F21",
                     "no kind of vocabulary",
                     With([](GgufBuilder& g) { g.RemoveKey("tokenizer.ggml.model"); }),
                     {kFile, "tokenizer.ggml.model is missing"}},
                    {"F21",
                     "bos outside",
                     With([](GgufBuilder& g) { g.U32("tokenizer.ggml.bos_token_id", 8); }),
                     {kFile, "bos_token_id"}},
                    {"F21",
                     "eos of 2^32 - 1",
                     With([](GgufBuilder& g) { g.U32("tokenizer.ggml.eos_token_id", ~0U); }),
                     {kFile, "eos_token_id"}},
                    {"F21",
                     "padding outside",
                     With([](GgufBuilder& g) { g.U32("tokenizer.ggml.padding_token_id", 100); }),
                     {kFile, "padding_token_id = 100 is outside"}},
                    {"F21",
                     "add_bos_token a number",
                     With([](GgufBuilder& g) { g.U32("tokenizer.ggml.add_bos_token", 1); }),
                     {kFile, "add_bos_token must be a bool"}},
                    {"F21",
                     "add_bos_token of 2",
                     Key("tokenizer.ggml.add_bos_token", 7, "\2"),
                     {kFile, "add_bos_token must be a bool"}},
                    {"F21",
                     "a score that is not a number",
                     With([](GgufBuilder& g) {
                       g.Floats("tokenizer.ggml.scores",
                                {0, std::numeric_limits<float>::quiet_NaN(), 0, 0, 0, 0, 0, 0});
                     }),
                     {kFile, "tokenizer.ggml.scores", "finite"}},
                },
                OpenGguf);
}

// NOLINTNEXTLINE(readability-function-size): a table
TEST(BadFilesTest, GgufConfigurations) {
  std::vector<BadFile> cases = {
      {"F16",
       "no architecture",
       With([](GgufBuilder& g) { g.RemoveKey("general.architecture"); }),
       {kFile, "general.architecture is missing"}},
      {"F16",
       "another architecture",
       With([](GgufBuilder& g) { g.Text("general.architecture", "gpt2"); }),
       {kFile, "gpt2"},
       kUnimplemented},
      {"F16",
       "experts",
       With([](GgufBuilder& g) { g.U32("llama.expert_count", 8); }),
       {kFile, "mixture of experts"},
       kUnimplemented},
      {"F16",
       "rope of part of a head",
       With([](GgufBuilder& g) { g.U32("llama.rope.dimension_count", 8); }),
       {kFile, "part of a head"},
       kUnimplemented},
      {"F16",
       "rope scaling by yarn",
       With([](GgufBuilder& g) { g.Text("llama.rope.scaling.type", "yarn"); }),
       {kFile, "yarn"},
       kUnimplemented},
      {"F16",
       "epsilon not a number",
       With([](GgufBuilder& g) {
         g.F32("llama.attention.layer_norm_rms_epsilon", std::numeric_limits<float>::quiet_NaN());
       }),
       {kFile, "layer_norm_rms_epsilon"}},
      {"F16",
       "rope base infinite",
       With([](GgufBuilder& g) {
         g.F32("llama.rope.freq_base", std::numeric_limits<float>::infinity());
       }),
       {kFile, "llama.rope.freq_base"}},
      {"F16",
       "three heads in a width of 32",
       With([](GgufBuilder& g) { g.U32("llama.attention.head_count", 3); }),
       {kFile}},
      {"F16",
       "heads that the key/value heads do not divide",
       With([](GgufBuilder& g) { g.U32("llama.attention.head_count_kv", 3); }),
       {kFile, "heads"}},
      {"F16",
       "a tensor of another shape",
       With([](GgufBuilder& g) {
         g.Tensor("blk.0.ffn_up.weight", 0, {32, 63}, Repeat<float>(1, 32 * 63));
       }),
       {kFile, "blk.0.ffn_up.weight", "[63, 32]", "[64, 32]"}},
      {"F16",
       "a tensor that is missing",
       With([](GgufBuilder& g) { g.RemoveTensor("blk.0.attn_k.weight"); }),
       {kFile, "blk.0.attn_k.weight is missing"}},
      {"F16",
       "no embedding table",
       With([](GgufBuilder& g) { g.RemoveTensor("token_embd.weight"); }),
       {kFile, "token_embd.weight is missing"}},
      {"F20",
       "a weight that is not a number",
       With([](GgufBuilder& g) {
         g.Tensor("output_norm.weight", 0, {32},
                  Repeat<float>(1, 31) + Number(std::numeric_limits<float>::quiet_NaN()));
       }),
       {"norm.weight", "element 31 is not finite"}},
      {"F20",
       "an infinite Q8_0 scale",
       With([](GgufBuilder& g) {
         g.Tensor("blk.0.ffn_up.weight", 8, {32, 64},
                  Number<uint16_t>(0x7C00) + std::string(size_t{64} * 34 - 2, '\0'));
       }),
       {"mlp.up_proj.weight", "scales[0]"}},
      {"F20",
       "a Q4_0 scale that is not a number",
       With([](GgufBuilder& g) {
         g.Tensor("blk.0.ffn_up.weight", 2, {32, 64},
                  Number<uint16_t>(0x7E00) + std::string(size_t{64} * 18 - 2, '\0'));
       }),
       {"mlp.up_proj.weight", "scales[0]"}},
      {"F20",
       "an infinite Q4_1 offset",
       With([](GgufBuilder& g) {
         g.Tensor("blk.0.ffn_up.weight", 3, {32, 64},
                  Number<uint16_t>(0) + Number<uint16_t>(0xFC00) +
                      std::string(size_t{64} * 20 - 4, '\0'));
       }),
       {"mlp.up_proj.weight", "offsets[0]"}},
  };
  for (const char* key :
       {"llama.block_count", "llama.embedding_length", "llama.feed_forward_length",
        "llama.context_length", "llama.attention.head_count"}) {
    cases.push_back({"F17",
                     std::string("no ") + key,
                     With([&](GgufBuilder& g) { g.RemoveKey(key); }),
                     {kFile, key, "is missing"}});
    cases.push_back({"F17",
                     std::string(key) + " = 0",
                     With([&](GgufBuilder& g) { g.U32(key, 0); }),
                     {kFile, key}});
    cases.push_back({"F17",
                     std::string(key) + " = 2^32 - 1",
                     With([&](GgufBuilder& g) { g.U32(key, ~0U); }),
                     {kFile}});
    cases.push_back({"F17",
                     std::string(key) + " a string",
                     With([&](GgufBuilder& g) { g.Text(key, "1"); }),
                     {kFile, key}});
  }
  ExpectRefused("gguf", cases, OpenGguf);
}

}  // namespace
}  // namespace sluice::bad_files
