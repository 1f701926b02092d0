#include "services/checkpoint/gguf.h"

#include <filesystem>

#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/fails.h"

namespace sluice::checkpoint {
namespace {

std::string Little(uint64_t value, int bytes) {
  return Bytes(std::vector<uint64_t>{value}).substr(0, bytes);
}

absl::Status StatusOf(const TempDir& dir, const std::string& file) {
  dir.Write("m.gguf", file);
  return GgufFile::Open(*ModelDir::Open(dir.path())->OpenFile("m.gguf")).status();
}
absl::Status StatusOf(const GgufBuilder& builder) {
  const TempDir dir;
  return StatusOf(dir, builder.Build());
}

TEST(GgufTest, ReadsTypedValues) {
  GgufBuilder builder = GgufBuilder::Llama();
  builder.Raw("i8", 1, "\xFE");
  builder.Raw("u64", 10, Little(1ULL << 40, 8));
  builder.Flag("flag", true);
  builder.Floats("floats", {1.5F, -2});
  const TempDir dir;
  dir.Write("m.gguf", builder.Build());
  const absl::StatusOr<GgufFile> gguf =
      GgufFile::Open(*ModelDir::Open(dir.path())->OpenFile("m.gguf"));
  ASSERT_TRUE(gguf.ok()) << gguf.status();
  EXPECT_EQ(*gguf->Uint("llama.block_count", 1, 10), 1U);
  EXPECT_EQ(*gguf->Uint("u64", 0, UINT64_MAX), 1ULL << 40);
  EXPECT_EQ(*gguf->Bool("flag"), true);
  EXPECT_EQ((*gguf->Floats("floats"))->at(1), -2);
  EXPECT_EQ((*gguf->Texts("tokenizer.ggml.tokens"))->size(), 8U);
  EXPECT_EQ(gguf->Find("blk.0.ffn_down.weight")->shape, (Shape{32, 64}));
  EXPECT_TRUE(Invalid(gguf->Uint("i8", 0, 10).status(), {"key i8"}));      // Negative.
  EXPECT_TRUE(Invalid(gguf->Uint("flag", 0, 10).status(), {"key flag"}));  // A bool is no number.
  EXPECT_TRUE(Invalid(gguf->Double("u64", 0, 10).status(), {"key u64"}));
  EXPECT_TRUE(Invalid(gguf->Floats("tokenizer.ggml.token_type").status(), {"float32"}));
  EXPECT_TRUE(Invalid(gguf->Text("gone").status(), {"key gone is missing"}));
}

// F7: an array declared as u8 and read as something else.
TEST(GgufTest, ElementTypesAreNeverCast) {
  GgufBuilder builder = GgufBuilder::Llama();
  builder.Raw("tokenizer.ggml.scores", 9, Little(0, 4) + Little(8, 8) + std::string(8, '\1'));
  const TempDir dir;
  EXPECT_TRUE(Invalid(builder.Open(dir).status(), {"tokenizer.ggml.scores", "float32"}));
  builder.Raw("tokenizer.ggml.tokens", 9, Little(0, 4) + Little(8, 8) + std::string(8, '\1'));
  EXPECT_TRUE(Invalid(builder.Open(dir).status(), {"tokenizer.ggml.tokens", "strings"}));
}

// F7, F3
TEST(GgufTest, CountsAndLengthsAreChecked) {
  GgufBuilder builder = GgufBuilder::Llama();
  builder.extra_tensor_count = UINT64_MAX / 2;
  EXPECT_TRUE(Invalid(StatusOf(builder), {"tensors"}));
  builder = GgufBuilder::Llama();
  builder.extra_key_count = 1ULL << 40;
  EXPECT_TRUE(Invalid(StatusOf(builder), {"keys"}));
  for (const uint64_t count : {uint64_t{1} << 63, uint64_t{1} << 40, uint64_t{5'000'000}}) {
    builder = GgufBuilder::Llama();
    builder.Raw("a", 9, Little(0, 4) + Little(count, 8));
    EXPECT_TRUE(Invalid(StatusOf(builder), {"an array of"})) << count;
    builder.Raw("a", 8, Little(count, 8));
    EXPECT_TRUE(Invalid(StatusOf(builder), {"string of"})) << count;
  }
  builder = GgufBuilder::Llama();
  builder.Raw("a", 9, Little(9, 4) + Little(1, 8) + Little(0, 4) + Little(0, 8));
  EXPECT_TRUE(Invalid(StatusOf(builder), {"array of arrays"}));
  builder.Raw("a", 13, "");
  EXPECT_TRUE(Invalid(StatusOf(builder), {"value type 13"}));
}

// F7
TEST(GgufTest, AlignmentIsAPowerOfTwo) {
  for (const uint32_t bad : {0U, 3U, 48U, 0x80000000U, 131072U}) {
    GgufBuilder builder = GgufBuilder::Llama();
    builder.U32("general.alignment", bad);
    EXPECT_TRUE(Invalid(StatusOf(builder), {"general.alignment"})) << bad;
  }
  GgufBuilder builder = GgufBuilder::Llama();
  builder.alignment = 64;
  builder.U32("general.alignment", 64);
  EXPECT_TRUE(StatusOf(builder).ok()) << StatusOf(builder);
}

// F1, F8
TEST(GgufTest, DimensionsAreChecked) {
  for (const uint64_t dim :
       {uint64_t{0}, uint64_t{1} << 31, uint64_t{1} << 32, uint64_t{1} << 63}) {
    GgufBuilder builder = GgufBuilder::Llama();
    builder.Tensor("x", 0, {dim, 1}, "");
    EXPECT_TRUE(Invalid(StatusOf(builder), {"tensor x", "out of range"})) << dim;
  }
  GgufBuilder builder = GgufBuilder::Llama();
  const uint64_t most = (uint64_t{1} << 31) - 1;
  builder.Tensor("x", 0, {most, most, most, most}, "");
  EXPECT_TRUE(Invalid(StatusOf(builder), {"too many elements"}));
  builder.Tensor("x", 0, {1, 1, 1, 1, 1}, "1234");
  EXPECT_TRUE(Invalid(StatusOf(builder), {"5 dimensions"}));
  builder.Tensor("x", 3, {31, 1}, std::string(20, 0));
  EXPECT_TRUE(Invalid(StatusOf(builder), {"31 columns", "Q4_1"}));
}

// F2, F4
TEST(GgufTest, TensorsMustLieOneAfterTheOther) {
  GgufBuilder builder = GgufBuilder::Llama();
  builder.Tensor("token_embd.weight", 0, {32, 8},
                 std::string(1024 + 64, 0));  // More than its shape.
  EXPECT_TRUE(Invalid(StatusOf(builder), {"1088 bytes"}) ||
              Invalid(StatusOf(builder), {"after the last"}));
  builder.Tensor("blk.0.attn_k.weight", 0, {32, 16}, std::string(2048 + 64, 0));
  EXPECT_TRUE(Invalid(StatusOf(builder), {"lies at offset"}));
  builder = GgufBuilder::Llama();
  builder.Tensor("zz", 0, {32, 8}, std::string(1000, 0));  // Cut.
  EXPECT_TRUE(Invalid(StatusOf(builder), {"tensor zz needs 1024 bytes"}));
}

// F5
TEST(GgufTest, DuplicatesAreRefused) {
  const auto entry = [](const std::string& key) {
    return Little(key.size(), 8) + key + Little(4, 4) + Little(1, 4);
  };
  const std::string head = "GGUF" + Little(3, 4) + Little(0, 8) + Little(2, 8);
  const TempDir dir;
  EXPECT_TRUE(StatusOf(dir, head + entry("a") + entry("b") + std::string(64, 0)).ok() ||
              Invalid(StatusOf(dir, head + entry("a") + entry("b") + std::string(64, 0)),
                      {"after the last"}));
  EXPECT_TRUE(Invalid(StatusOf(dir, head + entry("a") + entry("a")), {"key a appears twice"}));
  const std::string info =
      Little(1, 8) + "t" + Little(1, 4) + Little(8, 8) + Little(0, 4) + Little(0, 8);
  const std::string twice = "GGUF" + Little(3, 4) + Little(2, 8) + Little(0, 8) + info + info;
  EXPECT_TRUE(Invalid(StatusOf(dir, twice + std::string(128, 0)), {"tensor t appears twice"}));
}

// F6
TEST(GgufTest, EveryTruncationIsRefused) {
  GgufBuilder builder = GgufBuilder::Llama();
  size_t header = 0;
  const std::string whole = builder.Build(&header);
  const TempDir dir;
  ASSERT_TRUE(StatusOf(dir, whole).ok());
  for (size_t size = whole.size() - 1; size > 0; size -= size > header + 64 ? 64 : 1) {
    std::filesystem::resize_file(dir.path() + "/m.gguf", size);
    auto file = ModelDir::Open(dir.path())->OpenFile("m.gguf");
    EXPECT_TRUE(Invalid(GgufFile::Open(*std::move(file)).status(), {"m.gguf"})) << size;
  }
}

TEST(GgufTest, NoFlippedBitCrashes) {
  size_t header = 0;
  const std::string whole = GgufBuilder::Llama().Build(&header);
  const TempDir dir;
  dir.Write("model.gguf", whole);
  int refused = 0;
  for (size_t bit = 0; bit < header * 8; ++bit) {
    dir.Overwrite("model.gguf", bit / 8, static_cast<char>(whole[bit / 8] ^ (1 << bit % 8)));
    if (!Checkpoint::Open(dir.path() + "/model.gguf").ok()) ++refused;
    dir.Overwrite("model.gguf", bit / 8, whole[bit / 8]);
  }
  EXPECT_GT(refused, static_cast<int>(header) * 4);
}

TEST(GgufTest, NamesVersionsAndTypesThatAreNotSupported) {
  GgufBuilder builder = GgufBuilder::Llama();
  builder.version = 1;
  EXPECT_TRUE(Unsupported(StatusOf(builder), {"version 1"}));
  builder.version = 0x03000000;
  EXPECT_TRUE(Unsupported(StatusOf(builder), {"big-endian"}));
  builder = GgufBuilder::Llama();
  builder.Tensor("blk.0.ffn_down.weight", 12, {256, 8}, std::string(1152, 0));
  EXPECT_TRUE(Unsupported(StatusOf(builder), {"blk.0.ffn_down.weight", "Q4_K", "Q8_0"}));
  const TempDir dir;
  EXPECT_TRUE(Invalid(StatusOf(dir, "version https://git-lfs.github.com/spec/v1\noid x\n"),
                      {"git lfs pull"}));
  EXPECT_TRUE(Invalid(StatusOf(dir, std::string(100, 'x')), {"GGUF"}));
}

}  // namespace
}  // namespace sluice::checkpoint
