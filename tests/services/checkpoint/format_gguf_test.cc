// Models in GGUF files: blocks, row order, keys, vocabulary.
#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/fails.h"

namespace sluice::checkpoint {
namespace {

std::string HalfBytes(float value) { return Bytes<uint16_t>({FloatToHalf(value)}); }

// A block of 32 codes: byte j holds element j low and element j + 16 high.
template <typename F>
std::string Nibbles(F code) {
  std::string bytes(16, '\0');
  for (int j = 0; j < 16; ++j) bytes[j] = static_cast<char>(code(j) | code(j + 16) << 4);
  return bytes;
}

class GgufModelTest : public testing::Test {
 protected:
  GgufModelTest() : builder_(GgufBuilder::Llama()) {}

  // Opens and reads a tensor.
  absl::StatusOr<QuantizedMatrix> Read(const std::string& name) {
    checkpoint_ = builder_.Open(dir_);
    if (!checkpoint_.ok()) return checkpoint_.status();
    return ReadNamed(**checkpoint_, name);
  }

  TempDir dir_;
  GgufBuilder builder_;
  absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint_;
};

int CodeAt(int row, int block, int i) { return (row * 3 + block * 5 + i) % 16; }

TEST_F(GgufModelTest, ReadsQ4Blocks) {
  for (const bool with_minimum : {false, true}) {
    std::string data;
    std::vector<float> want;
    for (int row = 0; row < 32; ++row) {
      for (int block = 0; block < 2; ++block) {
        const float d = 0.25F * static_cast<float>(row + 1),
                    m = -0.5F * static_cast<float>(block + 1);
        data += HalfBytes(d) + (with_minimum ? HalfBytes(m) : "") +
                Nibbles([&](int i) { return CodeAt(row, block, i); });
        for (int i = 0; i < 32; ++i) {
          const auto code = static_cast<float>(CodeAt(row, block, i));
          want.push_back(with_minimum ? d * code + m : d * (code - 8));
        }
      }
    }
    builder_.Tensor("blk.0.ffn_down.weight", with_minimum ? 3 : 2, {64, 32}, data);
    const absl::StatusOr<QuantizedMatrix> matrix = Read("layers.0.mlp.down_proj.weight");
    ASSERT_TRUE(matrix.ok()) << matrix.status();
    EXPECT_EQ(matrix->spec.format,
              with_minimum ? QuantFormat::kInt4Offset : QuantFormat::kInt4Zero);
    EXPECT_EQ(Dequantize(*matrix), want);
  }
}

// One Q4_1 block, byte by byte: codes 0..15 twice.
TEST_F(GgufModelTest, Q41BlockByHand) {
  std::string block = HalfBytes(0.5F) + HalfBytes(-3);
  for (int j = 0; j < 16; ++j) block += static_cast<char>(j | (15 - j) << 4);
  std::string data;
  for (int i = 0; i < 64; ++i) data += block;
  builder_.Tensor("blk.0.ffn_down.weight", 3, {64, 32}, data);
  const absl::StatusOr<QuantizedMatrix> matrix = Read("layers.0.mlp.down_proj.weight");
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_EQ(matrix->codes()[0], 0x10);  // Elements 0 and 1.
  EXPECT_EQ(matrix->codes()[8], 0xEF);  // Elements 16 and 17: 15 and 14.
  const std::vector<float> row = Dequantize(*matrix);
  EXPECT_EQ(row[1], 0.5F * 1 - 3);
  EXPECT_EQ(row[16], 0.5F * 15 - 3);
}

TEST_F(GgufModelTest, ReadsQ80) {
  std::string data;
  std::vector<float> want;
  for (int row = 0; row < 8; ++row) {
    data += HalfBytes(0.125F);
    for (int i = 0; i < 32; ++i) {
      const auto code = static_cast<int8_t>(row * 32 + i - 128);
      data += static_cast<char>(code);
      want.push_back(0.125F * code);
    }
  }
  builder_.Tensor("token_embd.weight", 8, {32, 8}, data);
  const absl::StatusOr<QuantizedMatrix> matrix = Read("embed_tokens.weight");
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_EQ(matrix->spec.format, QuantFormat::kInt8);
  EXPECT_EQ(Dequantize(*matrix), want);
  EXPECT_EQ((*checkpoint_)->description().quant().method(), "gguf");
}

// Rows of q lie as [head, pair, half]; canonical is [head, half, pair]. Head size 16: canonical row
// 1 of a head is the file's row 2, row 8 is row 1.
TEST_F(GgufModelTest, RowsOfQueryAndKeyArePutBack) {
  std::vector<float> rows;
  for (int row = 0; row < 32; ++row) {
    for (int i = 0; i < 32; ++i) rows.push_back(static_cast<float>(row));
  }
  builder_.Tensor("blk.0.attn_q.weight", 0, {32, 32}, Bytes(rows));
  absl::StatusOr<QuantizedMatrix> matrix = Read("layers.0.self_attn.q_proj.weight");
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  std::vector<float> got = Dequantize(*matrix);
  for (int head = 0; head < 2; ++head) {
    for (int half = 0; half < 2; ++half) {
      for (int pair = 0; pair < 8; ++pair) {
        EXPECT_EQ(got[(head * 16 + half * 8 + pair) * 32], head * 16 + pair * 2 + half);
      }
    }
  }
  // The same through slabs that begin and end within a row, and for quantized rows.
  std::vector<uint8_t> slab(300);
  ASSERT_TRUE((*checkpoint_)->ReadPlain(2, 200, 300, slab.data()).ok());
  EXPECT_EQ(std::memcmp(slab.data(), reinterpret_cast<const uint8_t*>(got.data()) + 200, 300), 0);
  std::string data;
  for (int row = 0; row < 32; ++row)
    data += HalfBytes(static_cast<float>(row)) + std::string(16, '\x99');
  builder_.Tensor("blk.0.attn_q.weight", 2, {32, 32}, data);
  matrix = Read("layers.0.self_attn.q_proj.weight");
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_EQ(Dequantize(*matrix), got);
}

TEST_F(GgufModelTest, OtherRowsKeepTheirOrder) {
  std::vector<float> rows;
  for (int row = 0; row < 16; ++row) rows.insert(rows.end(), 32, static_cast<float>(row));
  builder_.Tensor("blk.0.attn_v.weight", 0, {32, 16}, Bytes(rows));
  EXPECT_EQ(Dequantize(*Read("layers.0.self_attn.v_proj.weight")), rows);
}

TEST_F(GgufModelTest, BiasOfQueryIsPutBackByElement) {
  std::vector<float> bias(32);
  for (int i = 0; i < 32; ++i) bias[i] = static_cast<float>(i);
  for (const char* name : {"blk.0.attn_q.bias", "blk.0.attn_output.bias"}) {
    builder_.Tensor(name, 0, {32}, Bytes(bias));
  }
  builder_.Tensor("blk.0.attn_k.bias", 0, {16}, Repeat<float>(0, 16));
  builder_.Tensor("blk.0.attn_v.bias", 0, {16}, Repeat<float>(0, 16));
  const absl::StatusOr<QuantizedMatrix> matrix = Read("layers.0.self_attn.q_proj.bias");
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_EQ(Dequantize(*matrix)[1], 2);
  EXPECT_EQ(Dequantize(*matrix)[8], 1);
  EXPECT_EQ(Dequantize(*matrix)[17], 18);
}

TEST_F(GgufModelTest, DescribesTheModel) {
  ASSERT_TRUE(Read("norm.weight").ok());
  const auto& description = (*checkpoint_)->description();
  EXPECT_EQ(description.model_name(), "model");
  EXPECT_TRUE(description.config().tie_word_embeddings());
  EXPECT_EQ(description.config().rope().theta(), 10000);
  EXPECT_EQ(description.tensors(0).name(), "embed_tokens.weight");
  EXPECT_EQ(description.source_tensors(2).name(), "model.layers.0.self_attn.q_proj.weight");
  ASSERT_EQ(description.files_size(), 1);
  const Json vocabulary = Json::parse(*(*checkpoint_)->ReadFile("gguf_vocab.json"));
  EXPECT_EQ(vocabulary["model"], "gpt2");
  EXPECT_EQ(vocabulary["tokens"][1], "b");
  EXPECT_EQ(vocabulary["token_type"][0], 3);
  EXPECT_EQ(vocabulary["merges"][0], "a b");
  EXPECT_EQ(vocabulary["eos_token_id"], 2);
  EXPECT_FALSE(vocabulary.contains("bos_token_id"));
  EXPECT_FALSE(vocabulary.contains("scores"));
  EXPECT_EQ((*checkpoint_)->ReadFile("config.json").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(GgufModelTest, RecognizesLlama3Frequencies) {
  builder_.F32("llama.rope.freq_base", 500000);
  // Head size 16: by the rule of Llama 3.1 (factor 8, low 1, high 4, original 8192).
  std::vector<float> factors;
  for (int i = 0; i < 8; ++i) {
    const double wavelength = 2 * M_PI * std::pow(500000.0, i / 8.0);
    const double smooth = (8192 / wavelength - 1) / 3;
    factors.push_back(static_cast<float>(wavelength < 2048   ? 1
                                         : wavelength > 8192 ? 8
                                                             : 1 / ((1 - smooth) / 8 + smooth)));
  }
  builder_.Tensor("rope_freqs.weight", 0, {8}, Bytes(factors));
  ASSERT_TRUE(Read("norm.weight").ok());
  EXPECT_EQ((*checkpoint_)->description().config().rope().type(), "llama3");
  EXPECT_EQ((*checkpoint_)->description().config().rope().factor(), 8);
  factors[7] = 3;
  builder_.Tensor("rope_freqs.weight", 0, {8}, Bytes(factors));
  EXPECT_TRUE(Unsupported(Read("norm.weight").status(), {"rope_freqs"}));
}

TEST_F(GgufModelTest, RefusesOtherArchitecturesAndOptionsByName) {
  builder_.U32("llama.expert_count", 8);
  EXPECT_TRUE(Unsupported(Read("norm.weight").status(), {"experts"}));
  builder_ = GgufBuilder::Llama();
  builder_.Text("llama.rope.scaling.type", "yarn");
  EXPECT_TRUE(Unsupported(Read("norm.weight").status(), {"yarn"}));
  builder_ = GgufBuilder::Llama();
  builder_.U32("llama.rope.dimension_count", 8);
  EXPECT_TRUE(Unsupported(Read("norm.weight").status(), {"part of a head"}));
  builder_.Text("general.architecture", "qwen2");
  EXPECT_TRUE(Unsupported(Read("norm.weight").status(), {"qwen2"}));
}

// F16, F17
TEST_F(GgufModelTest, KeysAndTensorsMustAgree) {
  const auto fails_with = [this](const char* key, uint32_t value) {
    builder_ = GgufBuilder::Llama();
    builder_.RemoveKey("llama.rope.dimension_count");
    builder_.U32(key, value);
    return Read("norm.weight").status();
  };
  EXPECT_TRUE(Invalid(fails_with("llama.block_count", 0), {"llama.block_count"}));
  EXPECT_TRUE(Invalid(fails_with("llama.block_count", 1'000'000'000), {"1000"}));
  EXPECT_TRUE(Invalid(fails_with("llama.block_count", 2), {"blk.1.", "is missing"}));
  EXPECT_TRUE(Invalid(fails_with("llama.attention.head_count", 0), {"head_count"}));
  EXPECT_TRUE(Invalid(fails_with("llama.attention.head_count_kv", 3), {"must divide"}));
  EXPECT_TRUE(
      Invalid(fails_with("llama.feed_forward_length", 96), {"ffn_gate.weight", "[96, 32]"}));
  EXPECT_TRUE(Invalid(fails_with("llama.embedding_length", 1 << 20), {"2^17"}));
  EXPECT_TRUE(Invalid(fails_with("tokenizer.ggml.eos_token_id", 8), {"eos_token_id"}));
  builder_ = GgufBuilder::Llama();
  builder_.RemoveKey("llama.context_length");
  EXPECT_TRUE(Invalid(Read("norm.weight").status(), {"llama.context_length is missing"}));
  builder_ = GgufBuilder::Llama();
  builder_.Ints("tokenizer.ggml.token_type", {1, 1});
  EXPECT_TRUE(Invalid(Read("norm.weight").status(), {"token_type", "2 values for 8 tokens"}));
}

// F20
TEST_F(GgufModelTest, ValuesMustBeFinite) {
  builder_.Tensor("output_norm.weight", 0, {32}, Repeat<uint32_t>(0x7FC00000, 32));
  EXPECT_TRUE(Invalid(Read("norm.weight").status(), {"tensor norm.weight", "not finite"}));
  builder_ = GgufBuilder::Llama();
  builder_.Tensor("token_embd.weight", 8, {32, 8}, std::string(34 * 8, '\x7C'));
  std::string data = std::string(34 * 8, '\0');
  data[34 + 1] = '\x7C';  // The scale of the second row is infinite.
  builder_.Tensor("token_embd.weight", 8, {32, 8}, data);
  EXPECT_TRUE(Invalid(Read("embed_tokens.weight").status(), {"embed_tokens.weight", "scales[1]"}));
}

}  // namespace
}  // namespace sluice::checkpoint
