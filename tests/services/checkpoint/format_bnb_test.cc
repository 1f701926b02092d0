// bitsandbytes NF4 and FP4 linears, plain and nested.
#include <limits>

#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/fails.h"

namespace sluice::checkpoint {
namespace {

constexpr int kN = 32, kK = 64;  // mlp.down_proj of the tiny Llama.
constexpr char kName[] = "layers.0.mlp.down_proj.weight";
constexpr char kState[] = "weight.quant_state.bitsandbytes__nf4";

int CodeAt(int element) { return element * 5 % 16; }
float AbsmaxAt(int block) { return 0.5F + 0.25F * static_cast<float>(block % 7); }
float TableAt(int code) { return 0.1F * static_cast<float>(code) - 0.7F; }

BuiltTensor State(const Json& extra) {
  Json json = {{"quant_type", "nf4"}, {"blocksize", 64}, {"dtype", "float16"}, {"shape", {kN, kK}}};
  json.update(extra);
  const std::string text = json.dump();
  return {"U8", {text.size()}, text};
}

// Byte j holds element 2j in its high nibble.
TensorMap Parts(int block_size) {
  std::vector<uint8_t> packed(kN * kK / 2);
  for (int i = 0; i < kN * kK; ++i) packed[i / 2] |= CodeAt(i) << (i % 2 == 0 ? 4 : 0);
  const int blocks = kN * kK / block_size;
  std::vector<float> absmax(blocks), table(16);
  for (int i = 0; i < blocks; ++i) absmax[i] = AbsmaxAt(i);
  for (int i = 0; i < 16; ++i) table[i] = TableAt(i);
  return {{"weight", {"U8", {kN * kK / 2, 1}, Bytes(packed)}},
          {"weight.absmax", {"F32", {static_cast<uint64_t>(blocks)}, Bytes(absmax)}},
          {"weight.quant_map", {"F32", {16}, Bytes(table)}},
          {kState, State({{"blocksize", block_size}})}};
}

std::vector<float> Expected(int block_size) {
  std::vector<float> want(kN * kK);
  for (int i = 0; i < kN * kK; ++i) want[i] = TableAt(CodeAt(i)) * AbsmaxAt(i / block_size);
  return want;
}

class BnbTest : public testing::Test {
 protected:
  BnbTest() : model_(TinyModel::Llama()) {
    model_.config["quantization_config"] = {{"quant_method", "bitsandbytes"},
                                            {"load_in_4bit", true}};
  }
  absl::StatusOr<QuantizedMatrix> Read(const TensorMap& parts) {
    TinyModel model = model_;
    model.Quantize("mlp.down_proj", parts);
    absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint = model.Open(dir_);
    if (!checkpoint.ok()) return checkpoint.status();
    detail_ = (*checkpoint)->description().quant().detail();
    return ReadNamed(**checkpoint, kName);
  }
  TempDir dir_;
  TinyModel model_;
  std::string detail_;
};

TEST_F(BnbTest, ReadsPlain) {
  const absl::StatusOr<QuantizedMatrix> matrix = Read(Parts(64));
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_EQ(matrix->spec.format, QuantFormat::kTable4);
  EXPECT_EQ(matrix->spec.group_size, 64);
  EXPECT_EQ(Dequantize(*matrix), Expected(64));
  EXPECT_EQ(detail_, "nf4");
}

TEST_F(BnbTest, EvenElementIsTheHighNibble) {
  TensorMap parts = Parts(64);
  parts["weight"].data[0] = '\x12';  // Element 0 is 1, element 1 is 2.
  EXPECT_EQ(Read(parts)->codes()[0], 0x21);
}

// A block of 128 spans two rows of 64: each row repeats the scale.
TEST_F(BnbTest, BlocksMaySpanRows) {
  for (const int block_size : {32, 128, 512}) {
    const absl::StatusOr<QuantizedMatrix> matrix = Read(Parts(block_size));
    ASSERT_TRUE(matrix.ok()) << matrix.status();
    EXPECT_EQ(Dequantize(*matrix), Expected(block_size)) << block_size;
  }
}

TEST_F(BnbTest, ReadsNested) {
  TensorMap parts = Parts(64);
  constexpr int kBlocks = kN * kK / 64;
  std::vector<uint8_t> codes(kBlocks);
  std::vector<float> map(256);
  for (int i = 0; i < kBlocks; ++i) codes[i] = static_cast<uint8_t>(100 + i);
  for (int i = 0; i < 256; ++i) map[i] = static_cast<float>(i - 127) / 128;
  parts["weight.absmax"] = {"U8", {kBlocks}, Bytes(codes)};
  parts["weight.nested_absmax"] = {"F32", {2}, Bytes<float>({0.75F, 0.5F})};
  parts["weight.nested_quant_map"] = {"F32", {256}, Bytes(map)};
  parts[kState] =
      State({{"nested_blocksize", 16}, {"nested_dtype", "float32"}, {"nested_offset", 1.25}});
  const absl::StatusOr<QuantizedMatrix> matrix = Read(parts);
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_EQ(detail_, "nf4+nested");
  std::vector<float> want(kN * kK);
  for (int i = 0; i < kN * kK; ++i) {
    const int block = i / 64;
    const float absmax = map[codes[block]] * (block < 16 ? 0.75F : 0.5F) + 1.25F;
    want[i] = TableAt(CodeAt(i)) * absmax;
  }
  EXPECT_EQ(Dequantize(*matrix), want);
}

TEST_F(BnbTest, StorageDtypeDoesNotMatter) {
  TensorMap parts = Parts(64);
  parts["weight"].dtype = "BF16";
  parts["weight"].shape = {kN * kK / 4, 1};
  EXPECT_EQ(Dequantize(*Read(parts)), Expected(64));
}

TEST_F(BnbTest, BuiltInTablesWhenNoneIsStored) {
  TensorMap parts = Parts(64);
  parts.erase("weight.quant_map");
  EXPECT_FLOAT_EQ(Read(parts)->table()[1], -0.6961928009986877F);
  parts.erase(kState);
  Json state = {{"quant_type", "fp4"}, {"blocksize", 64}, {"shape", {kN, kK}}};
  parts["weight.quant_state.bitsandbytes__fp4"] = {"U8", {state.dump().size()}, state.dump()};
  const absl::StatusOr<QuantizedMatrix> matrix = Read(parts);
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_EQ(detail_, "fp4");
  const float want[16] = {0, .0625F / 12, 8 / 12.0F, 1, 4 / 12.0F, 6 / 12.0F, 2 / 12.0F, 3 / 12.0F};
  for (int i = 0; i < 8; ++i) {
    EXPECT_FLOAT_EQ(matrix->table()[i], want[i]) << i;
    EXPECT_FLOAT_EQ(matrix->table()[i + 8], -want[i]) << i;
  }
}

// The tiny OPT's fc1 with an odd number of columns: rows start in the middle of a byte.
TEST(BnbOddTest, OddColumns) {
  TinyModel model = TinyModel::Opt();
  model.config["quantization_config"] = {{"load_in_4bit", true}};
  model.config["ffn_dim"] = 3;
  const std::string p = "model.decoder.layers.0.";
  model.tensors[p + "fc1.weight"] = {"F16", {3, 16}, std::string(96, 0)};
  model.tensors[p + "fc1.bias"] = {"F16", {3}, std::string(6, 0)};
  std::vector<uint8_t> packed(24);
  for (int i = 0; i < 48; ++i) packed[i / 2] |= CodeAt(i) << (i % 2 == 0 ? 4 : 0);
  const std::string state = R"({"quant_type":"nf4","blocksize":32,"shape":[16,3]})";
  std::vector<float> table(16);
  for (int i = 0; i < 16; ++i) table[i] = TableAt(i);
  model.Quantize("fc2", {{"weight", {"U8", {24, 1}, Bytes(packed)}},
                         {"weight.absmax", {"F32", {2}, Bytes<float>({2, 3})}},
                         {"weight.quant_map", {"F32", {16}, Bytes(table)}},
                         {kState, {"U8", {state.size()}, state}}});
  const TempDir dir;
  const auto checkpoint = model.Open(dir);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const absl::StatusOr<QuantizedMatrix> matrix = ReadNamed(**checkpoint, "layers.0.fc2.weight");
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_EQ(matrix->spec.group_size, 1);  // gcd(3, 32)
  std::vector<float> want(48);
  for (int i = 0; i < 48; ++i) want[i] = TableAt(CodeAt(i)) * (i < 32 ? 2.0F : 3.0F);
  EXPECT_EQ(Dequantize(*matrix), want);
}

TEST_F(BnbTest, ChecksSizesAndDescription) {
  const auto with = [](const char* part, const BuiltTensor& tensor) {
    TensorMap parts = Parts(64);
    parts[part] = tensor;
    return parts;
  };
  EXPECT_TRUE(Invalid(Read(with("weight", {"U8", {1023, 1}, std::string(1023, 0)})).status(),
                      {"down_proj.weight", "1024"}));
  EXPECT_TRUE(Invalid(Read(with("weight.absmax", {"F32", {31}, std::string(124, 0)})).status(),
                      {"absmax"}));
  EXPECT_TRUE(
      Invalid(Read(with("weight.absmax", {"U8", {32}, std::string(32, 0)})).status(), {"absmax"}));
  EXPECT_TRUE(Invalid(Read(with("weight.quant_map", {"F32", {15}, std::string(60, 0)})).status(),
                      {"quant_map"}));
  for (const Json& bad :
       Json::parse(R"([{"blocksize":0},{"blocksize":-64},{"blocksize":48},{"blocksize":"64"},
       {"shape":[32,63]},{"shape":null},{"quant_type":"fp4"},{"nested_offset":"x"},{"nested_dtype":"float16"}])")) {
    EXPECT_TRUE(Invalid(Read(with(kState, State(bad))).status(), {"bitsandbytes__nf4"})) << bad;
  }
  EXPECT_TRUE(Invalid(Read(with(kState, {"U8", {3}, "{\"a"})).status(), {"bitsandbytes__nf4"}));
}

// F20
TEST_F(BnbTest, AbsmaxMustBeFiniteAndNotNegative) {
  TensorMap parts = Parts(64);
  std::vector<float> absmax(32, 1.0F);
  absmax[3] = 0;
  parts["weight.absmax"].data = Bytes(absmax);
  EXPECT_TRUE(Read(parts).ok());
  for (const float bad : {-0.5F, std::numeric_limits<float>::quiet_NaN(), INFINITY}) {
    absmax[3] = bad;
    parts["weight.absmax"].data = Bytes(absmax);
    EXPECT_TRUE(Invalid(Read(parts).status(), {kName, "absmax[3]"})) << bad;
  }
}

TEST_F(BnbTest, RefusesInt8AndQuantizingOnLoad) {
  TinyModel model = model_;
  EXPECT_TRUE(
      Unsupported(model.Open(dir_).status(), {"not quantized", "remove quantization_config"}));
  model.Quantize("mlp.down_proj", {{"weight", {"I8", {kN, kK}, std::string(kN * kK, 0)}},
                                   {"SCB", {"F32", {kN}, std::string(kN * 4, 0)}}});
  EXPECT_TRUE(Unsupported(model.Open(dir_).status(), {"down_proj.SCB", "LLM.int8"}));
}

}  // namespace
}  // namespace sluice::checkpoint
