#include "services/checkpoint/safetensors.h"

#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/fails.h"

namespace sluice::checkpoint {
namespace {

constexpr char kOneTensor[] = R"({"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}})";

// The set of a folder that holds `file` as model.safetensors.
absl::StatusOr<TensorSet> OpenSet(const TempDir& dir, const std::string& file) {
  dir.Write("model.safetensors", file);
  absl::StatusOr<ModelDir> model = ModelDir::Open(dir.path());
  return TensorSet::Open(*model);
}

absl::Status StatusOf(const std::string& file) {
  const TempDir dir;
  return OpenSet(dir, file).status();
}

absl::Status StatusOf(const std::string& header, size_t data_bytes) {
  return StatusOf(SafetensorsFile(header, std::string(data_bytes, '\1')));
}

TEST(SafetensorsTest, FindsTensors) {
  const TempDir dir;
  const absl::StatusOr<TensorSet> set = OpenSet(
      dir,
      SafetensorsFile({{"b", {"F32", {2, 1}, Bytes<float>({1, 2})}}, {"a", {"U8", {3}, "xyz"}}}));
  ASSERT_TRUE(set.ok()) << set.status();
  const StoredTensor* b = set->Find("b");
  ASSERT_NE(b, nullptr);
  EXPECT_EQ(b->shape, (Shape{2, 1}));
  float values[2];
  ASSERT_TRUE(b->file->ReadAt(b->offset, b->bytes, values).ok());
  EXPECT_EQ(values[1], 2);
  EXPECT_EQ(set->Find("c"), nullptr);
}

TEST(SafetensorsTest, AcceptsPaddingMetadataScalarsAndEmptyTail) {
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},)"
      R"("z":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}   )";
  EXPECT_TRUE(StatusOf(header, 4).ok());
}

// F1: the shape of a public attack, whose product wraps to 4 elements.
TEST(SafetensorsTest, ShapeProductMustNotOverflow) {
  EXPECT_TRUE(Invalid(StatusOf(R"({"a":{"dtype":"F16","shape":[4194305,4194305,211106198978564],)"
                               R"("data_offsets":[0,4]}})",
                               4),
                      {"model.safetensors", "tensor a", "too many elements"}));
  for (const char* dims :
       {"4398046511105,4398046511105", "9223372036854775808", "0,9223372036854775808"}) {
    const std::string header =
        std::string(R"({"a":{"dtype":"F16","shape":[)") + dims + R"(],"data_offsets":[0,4]}})";
    EXPECT_TRUE(Invalid(StatusOf(header, 4), {"tensor a"})) << dims;
  }
  for (const char* dim : {"-1", "2.0", "1e400", "\"2\"", "null", "18446744073709551616"}) {
    const std::string header =
        std::string(R"({"a":{"dtype":"F16","shape":[)") + dim + R"(],"data_offsets":[0,4]}})";
    EXPECT_TRUE(Invalid(StatusOf(header, 4), {})) << dim;
  }
}

// F2
TEST(SafetensorsTest, TensorMustLieInsideTheFile) {
  EXPECT_TRUE(Invalid(StatusOf(kOneTensor, 3), {"tensor a", "ends at byte 4 of 3"}));
  EXPECT_TRUE(Invalid(StatusOf(kOneTensor, 0), {"tensor a"}));
}

// F3
TEST(SafetensorsTest, HeaderBombsAreRefused) {
  EXPECT_TRUE(Invalid(StatusOf(std::string(7, '\0') + "\x80{}"), {"header of"}));
  std::string large = "{}";
  large.resize(26'000'000, ' ');
  EXPECT_TRUE(Invalid(StatusOf(large, 0), {"25000000 allowed"}));
  EXPECT_TRUE(Invalid(StatusOf("{\"a\":" + std::string(10'000, '['), 0), {"deeper than 32"}));
  std::string many = "{";
  for (int i = 0; i < 100'001; ++i) {
    many += (i == 0 ? "\"" : ",\"") + std::to_string(i) + "\":{}";
  }
  EXPECT_TRUE(Invalid(StatusOf(many + "}", 0), {"more than 100000 tensors"}));
  const std::string name(513, 'n');
  EXPECT_TRUE(
      Invalid(StatusOf("{\"" + name + R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1),
              {"512"}));
}

// F4
TEST(SafetensorsTest, OffsetsMustCoverTheDataExactly) {
  const auto two = [](const char* first, const char* second) {
    return std::string(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)") + first +
           R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)" + second + "}}";
  };
  EXPECT_TRUE(StatusOf(two("[0,4]", "[4,8]"), 8).ok());
  EXPECT_TRUE(StatusOf(two("[4,8]", "[0,4]"), 8).ok());
  EXPECT_TRUE(Invalid(StatusOf(two("[0,4]", "[4,8]"), 9), {"1 bytes after the last tensor"}));
  EXPECT_TRUE(Invalid(StatusOf(two("[0,4]", "[2,6]"), 6), {"gap or overlap"}));
  EXPECT_TRUE(Invalid(StatusOf(two("[0,4]", "[0,4]"), 4), {"gap or overlap"}));
  EXPECT_TRUE(Invalid(StatusOf(two("[0,4]", "[5,9]"), 9), {"gap or overlap"}));
  EXPECT_TRUE(Invalid(StatusOf(two("[1,5]", "[5,9]"), 9), {"gap or overlap"}));
  EXPECT_TRUE(Invalid(StatusOf(two("[4,0]", "[4,8]"), 8), {"begin <= end"}));
  EXPECT_TRUE(Invalid(StatusOf(two("[0,3]", "[3,7]"), 7), {"needs 4 bytes"}));
  const std::string alias = R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
                            R"("z":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})";
  EXPECT_TRUE(Invalid(StatusOf(alias, 4), {"no elements"}));
}

// F5
TEST(SafetensorsTest, DuplicateNamesAreRefused) {
  const std::string header = R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                             R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
  EXPECT_TRUE(Invalid(StatusOf(header, 1), {"\"a\" appears twice"}));
  EXPECT_TRUE(
      Invalid(StatusOf(R"({"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1),
              {"\"dtype\" appears twice"}));
}

// F6
TEST(SafetensorsTest, EveryTruncationIsRefused) {
  const std::string whole =
      SafetensorsFile({{"a", {"F16", {2}, "abcd"}}, {"b", {"F32", {1, 2}, "12345678"}}});
  ASSERT_TRUE(StatusOf(whole).ok());
  const TempDir dir;
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_TRUE(Invalid(OpenSet(dir, whole.substr(0, size)).status(), {"model.safetensors"}))
        << size;
  }
}

TEST(SafetensorsTest, NoFlippedBitCrashes) {
  const std::string whole = SafetensorsFile({{"a", {"F16", {2}, "abcd"}}});
  const TempDir dir;
  int refused = 0;
  for (size_t bit = 0; bit < (whole.size() - 4) * 8; ++bit) {
    std::string file = whole;
    file[bit / 8] = static_cast<char>(file[bit / 8] ^ (1 << bit % 8));
    const absl::StatusOr<TensorSet> set = OpenSet(dir, file);
    if (!set.ok()) {
      ++refused;
      continue;
    }
    ASSERT_EQ(set->tensors().size(), 1U);  // Another name or dtype of the same size.
    EXPECT_EQ(set->tensors()[0].bytes, 4U);
  }
  EXPECT_GT(refused, 300);
}

TEST(SafetensorsTest, NamesLfsPointersAndUnknownDtypes) {
  EXPECT_TRUE(
      Invalid(StatusOf("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
              {"Git LFS pointer", "git lfs pull"}));
  EXPECT_TRUE(Unsupported(StatusOf(R"({"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}})", 1),
                          {"tensor a", "F4"}));
}

}  // namespace
}  // namespace sluice::checkpoint
