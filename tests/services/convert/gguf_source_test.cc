// Conversions of GGUF files: names, order of rows, configuration, tokenizer.
#include <fstream>
#include <iterator>

#include "services/checkpoint/json.h"
#include "services/convert/convert.h"
#include "services/text/tokenizer.h"
#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/fails.h"
#include "tests/services/convert/stored_parts.h"

namespace sluice::convert {
namespace {

using checkpoint::Checkpoint;
using checkpoint::GgufBuilder;
using checkpoint::Json;
using checkpoint::TempDir;

std::string ContentOf(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  return {std::istreambuf_iterator<char>(file), {}};
}

GgufBuilder Model() {
  GgufBuilder gguf = GgufBuilder::Llama();
  gguf.Texts("tokenizer.ggml.tokens", {"<s>", "a", "b", "ab", "c", "Ġ", "<e>", "<p>"});
  gguf.Ints("tokenizer.ggml.token_type", {3, 1, 1, 1, 1, 1, 3, 3});
  gguf.Texts("tokenizer.ggml.merges", {"a b"});
  gguf.U32("tokenizer.ggml.bos_token_id", 0);
  gguf.U32("tokenizer.ggml.eos_token_id", 6);
  gguf.U32("tokenizer.ggml.padding_token_id", 7);
  gguf.Text("tokenizer.chat_template", "{{ messages[0]['content'] }}<e>");
  gguf.F32("llama.rope.freq_base", 50000);
  std::vector<float> rows;  // Every weight of row r is r
  for (int r = 0; r < 32; ++r) rows.insert(rows.end(), 32, static_cast<float>(r));
  gguf.Tensor("blk.0.attn_q.weight", 0, {32, 32}, checkpoint::Bytes(rows));
  return gguf;
}

class GgufSourceTest : public testing::Test {
 protected:
  std::string To(const GgufBuilder& gguf, const ConvertOptions& options, const std::string& name) {
    const auto source = gguf.Open(dir_);
    EXPECT_TRUE(source.ok()) << source.status();
    const std::string output = dir_.path() + "/" + name;
    const auto result = Convert(**source, options, output, [](auto, auto) { return true; });
    EXPECT_TRUE(result.ok()) << result.status();
    return output;
  }
  TempDir dir_;
};

TEST_F(GgufSourceTest, RowsOfQueryAreInHuggingFaceOrder) {
  const StoredParts parts(To(Model(), {}, "x"));
  const std::string bytes = parts.Read("model.layers.0.self_attn.q_proj.weight");
  ASSERT_EQ(bytes.size(), 32U * 32 * 2);
  for (int row = 0; row < 32; ++row) {
    // Two heads of 16: the file holds row i of the first half and of the second one side by side.
    const int head = row / 16, in_head = row % 16;
    const int source = head * 16 + 2 * (in_head % 8) + in_head / 8;
    uint16_t bits;
    std::memcpy(&bits, &bytes[row * 64], 2);
    EXPECT_EQ(HalfToFloat(bits), static_cast<float>(source)) << row;
  }
}

TEST_F(GgufSourceTest, ConfigurationComesFromTheKeys) {
  const std::string path = To(Model(), {}, "x");
  const Json config = Json::parse(ContentOf(path + "/config.json"));
  EXPECT_EQ(config["architectures"][0], "LlamaForCausalLM");
  EXPECT_EQ(config["rms_norm_eps"].dump(), "1e-05");
  EXPECT_EQ(config["rope_theta"], 50000.0);
  EXPECT_EQ(config["max_position_embeddings"], 128);
  EXPECT_EQ(config["head_dim"], 16);
  EXPECT_EQ(config["tie_word_embeddings"], true);
  const Json generation = Json::parse(ContentOf(path + "/generation_config.json"));
  EXPECT_EQ(generation["bos_token_id"], 0);
  EXPECT_EQ(generation["eos_token_id"], 6);
  EXPECT_EQ(generation["pad_token_id"], 7);
  // The reader sees the same model in both.
  const auto before = Model().Open(dir_), after = Checkpoint::Open(path);
  ASSERT_TRUE(before.ok() && after.ok()) << after.status();
  internal::v1::ModelConfig one = (*before)->description().config();
  one.set_dtype("float16");  // F32 in the file
  EXPECT_EQ(one.SerializeAsString(), (*after)->description().config().SerializeAsString());
}

TEST_F(GgufSourceTest, TokenizerAndTemplateAreTheSame) {
  const std::string path = To(Model(), {}, "x");
  const auto source = Model().Open(dir_);
  const auto before =
      text::Tokenizer::Load({{"gguf_vocab.json", *(*source)->ReadFile("gguf_vocab.json")}});
  text::TokenizerFiles files;
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}) {
    files[name] = ContentOf(path + "/" + name);
  }
  const auto after = text::Tokenizer::Load(files);
  ASSERT_TRUE(before.ok() && after.ok()) << before.status() << after.status();
  for (const char* text : {"ab", "abcab b", "a<e>b", "<s>ab<p>"}) {
    for (const bool special : {false, true}) {
      EXPECT_EQ(*(*before)->Encode(text, true, special), *(*after)->Encode(text, true, special))
          << text;
    }
  }
  EXPECT_EQ((*after)->bos_token_id(), 0U);
  EXPECT_EQ((*after)->eos_token_ids(), std::vector<uint32_t>{6});
  const std::vector<text::Tokenizer::ChatMessage> chat = {{"user", "ab"}};
  EXPECT_EQ(*(*after)->ApplyChatTemplate(chat, true), "ab<e>");
}

// Both kinds of vocabulary of GGUF files, as tokenizer.json.
TEST(TokenizerToJsonTest, EncodesAndDecodesAsBefore) {
  for (const char* kind : {"gguf_gpt2", "gguf_llama"}) {
    SCOPED_TRACE(kind);
    const std::string folder = std::string(SLUICE_TESTDATA "/text/") + kind;
    const auto before =
        text::Tokenizer::Load({{"gguf_vocab.json", ContentOf(folder + "/gguf_vocab.json")}});
    ASSERT_TRUE(before.ok()) << before.status();
    const auto json = (*before)->ToJson();
    ASSERT_TRUE(json.ok()) << json.status();
    const auto after = text::Tokenizer::Load({{"tokenizer.json", *json}});
    ASSERT_TRUE(after.ok()) << after.status();
    EXPECT_EQ((*before)->vocab_size(), (*after)->vocab_size());
    for (const char* text :
         {"The capital of France is Paris.", "  two  spaces, 12345\n\n\tna\u00efve",
          "\u65e5\u672c\u8a9e", "<s> </s> <unk> <|endoftext|>", "don't", ""}) {
      for (const bool special : {false, true}) {
        const auto ids = (*before)->Encode(text, /*add_special_tokens=*/true, special);
        ASSERT_TRUE(ids.ok()) << ids.status();
        EXPECT_EQ(*ids, *(*after)->Encode(text, /*add_special_tokens=*/true, special)) << text;
        EXPECT_EQ(*(*before)->Decode(*ids, true), *(*after)->Decode(*ids, true)) << text;
      }
    }
  }
}

TEST_F(GgufSourceTest, DirectAndByWayOfFloat16GiveTheSameFile) {
  GgufBuilder gguf = Model();
  std::string blocks;  // Q4_1: scale 0.25, minimum -1, codes
  for (int i = 0; i < 64; ++i) {
    blocks += checkpoint::Bytes(std::vector<uint16_t>{0x3400, 0xBC00});
    for (int j = 0; j < 16; ++j) blocks += static_cast<char>(i * 16 + 7 * j);
  }
  gguf.Tensor("blk.0.ffn_up.weight", 3, {32, 64}, blocks);
  ConvertOptions options;
  const std::string fp16 = To(gguf, options, "fp16");
  const auto middle = Checkpoint::Open(fp16);
  ASSERT_TRUE(middle.ok()) << middle.status();
  for (const Format format : {Format::kGptq, Format::kAwq, Format::kNf4, Format::kFp4}) {
    options.format = format;
    options.group_size = 32;
    const std::string direct = To(gguf, options, NameOf(format));
    const std::string second = direct + "-2";
    const auto result = Convert(**middle, options, second, [](auto, auto) { return true; });
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_TRUE(ContentOf(direct + "/model.safetensors") ==
                ContentOf(second + "/model.safetensors"))
        << NameOf(format);
  }
}

}  // namespace
}  // namespace sluice::convert
