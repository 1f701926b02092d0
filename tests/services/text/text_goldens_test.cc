// Ids and decoded text against Hugging Face `tokenizers` on 10,000 generated strings and 2,000 rows
// of random ids for each kind of vocabulary. How the .bin files come about:
// tests/testdata/text/make_goldens.py.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "services/checkpoint/checkpoint.h"
#include "tests/services/text/text_testdata.h"

namespace sluice::text {
namespace {

constexpr int kNumStrings = 10000;
constexpr int kMaxShownMismatches = 5;

// FNV-1a 64, folded to 32 bits.
class Hash {
 public:
  void Add(const std::string& bytes) {
    for (const char c : bytes) AddByte(static_cast<uint8_t>(c));
  }
  void Add(const std::vector<uint32_t>& ids) {
    for (const uint32_t id : ids) {
      for (int shift = 0; shift < 32; shift += 8) AddByte(static_cast<uint8_t>(id >> shift));
    }
  }
  uint32_t Folded() const { return static_cast<uint32_t>(h_) ^ static_cast<uint32_t>(h_ >> 32); }

 private:
  void AddByte(uint8_t byte) { h_ = (h_ ^ byte) * 0x100000001B3u; }
  uint64_t h_ = 0xCBF29CE484222325u;
};

template <typename T>
uint32_t HashOf(const T& value) {
  Hash hash;
  hash.Add(value);
  return hash.Folded();
}

std::vector<uint32_t> ReadWords(const std::string& name) {
  const std::string bytes = ReadFile(TestdataPath(name));
  std::vector<uint32_t> words(bytes.size() / 4);
  std::memcpy(words.data(), bytes.data(), words.size() * 4);
  return words;
}

std::string Shown(const std::vector<uint32_t>& ids) {
  std::string out;
  for (const uint32_t id : ids) out += std::to_string(id) + " ";
  return out;
}

void ExpectSameIds(const Tokenizer& tokenizer, const std::string& name) {
  const std::vector<uint32_t> want = ReadWords("ids." + name + ".bin");
  ASSERT_EQ(want.size(), 2u * kNumStrings);
  const StringGenerator generator;
  int mismatches = 0;
  for (int i = 0; i < kNumStrings && mismatches < kMaxShownMismatches; ++i) {
    const std::string text = generator.Make(i);
    const auto plain = tokenizer.Encode(text, /*add_special_tokens=*/false);
    const auto ids = tokenizer.Encode(text, /*add_special_tokens=*/true, /*parse_special=*/true);
    ASSERT_TRUE(plain.ok() && ids.ok()) << plain.status() << ids.status() << "\n" << text;
    const auto decoded = tokenizer.Decode(*ids, /*skip_special_tokens=*/true);
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    Hash both;
    both.Add(*ids);
    both.Add(*decoded);
    if (HashOf(*plain) == want[2 * i] && both.Folded() == want[2 * i + 1]) continue;
    ++mismatches;
    ADD_FAILURE() << name << " string " << i << ": " << nlohmann::json(text).dump(-1, ' ', true)
                  << "\nas text: " << Shown(*plain) << "\nwith control tokens: " << Shown(*ids)
                  << "\ndecoded: " << *decoded;
  }
}

void ExpectSameText(const Tokenizer& tokenizer, const std::string& name) {
  const std::vector<uint32_t> want = ReadWords("decode." + name + ".bin");
  ASSERT_EQ(want.size(), 4000u);
  for (size_t row = 0; row < want.size() / 2; ++row) {
    const std::vector<uint32_t> ids = RandomIds(row, tokenizer.vocab_size());
    const auto all = tokenizer.Decode(ids, /*skip_special_tokens=*/false);
    const auto skipped = tokenizer.Decode(ids, /*skip_special_tokens=*/true);
    ASSERT_TRUE(all.ok() && skipped.ok());
    ASSERT_EQ(HashOf(*all), want[2 * row]) << name << " ids " << Shown(ids);
    ASSERT_EQ(HashOf(*skipped), want[2 * row + 1]) << name << " ids " << Shown(ids);
  }
}

void ExpectGolden(const TokenizerFiles& files, const std::string& name) {
  const auto tokenizer = LoadOrDie(files);
  ASSERT_NE(tokenizer, nullptr);
  ExpectSameIds(*tokenizer, name);
  ExpectSameText(*tokenizer, name);
}

TEST(TextGoldensTest, TokenizerJsonByteLevel) { ExpectGolden(ByteLevelFiles(), "byte_level"); }
TEST(TextGoldensTest, TokenizerJsonSentencePiece) {
  ExpectGolden(SentencePieceFiles(), "sentencepiece");
}
TEST(TextGoldensTest, OptVocabAndMerges) { ExpectGolden(OptFiles(), "opt"); }
TEST(TextGoldensTest, GgufGpt2) { ExpectGolden(GgufGpt2Files("gpt-2"), "gguf_gpt2.gpt-2"); }
TEST(TextGoldensTest, GgufSmollm) { ExpectGolden(GgufGpt2Files("smollm"), "gguf_gpt2.smollm"); }
TEST(TextGoldensTest, GgufLlama3) {
  ExpectGolden(GgufGpt2Files("llama-bpe"), "gguf_gpt2.llama-bpe");
}
TEST(TextGoldensTest, GgufQwen2) { ExpectGolden(GgufGpt2Files("qwen2"), "gguf_gpt2.qwen2"); }
TEST(TextGoldensTest, GgufSentencePiece) { ExpectGolden(GgufLlamaFiles(), "gguf_llama"); }

// The default model's vocabulary, as the loader hands it over. ./dev test fetches the model.
TEST(TextGoldensTest, SmolLm2) {
  const char* model = std::getenv("SLUICE_MODEL");
  ASSERT_NE(model, nullptr) << "run ./dev test, which fetches the model and sets SLUICE_MODEL";
  const auto checkpoint = checkpoint::Checkpoint::Open(model);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto vocab = (*checkpoint)->ReadFile("gguf_vocab.json");
  ASSERT_TRUE(vocab.ok()) << vocab.status();
  ExpectGolden({{"gguf_vocab.json", *vocab}}, "smollm2");
  const auto tokenizer = LoadOrDie({{"gguf_vocab.json", *vocab}});
  const std::vector<uint32_t> want = {504, 3575, 282, 4649, 314};
  EXPECT_EQ(tokenizer->Encode("The capital of France is", true).value(), want);
}

TEST(TextGoldensTest, ThreadsShareATokenizer) {
  const auto tokenizer = LoadOrDie(SentencePieceFiles());
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&tokenizer] { ExpectSameText(*tokenizer, "sentencepiece"); });
    threads.emplace_back([&tokenizer] { ExpectSameIds(*tokenizer, "sentencepiece"); });
  }
  for (std::thread& thread : threads) thread.join();
}

// Merges are written as "a b" or as ["a", "b"].
TEST(TextGoldensTest, BothFormsOfMergesLoad) {
  TokenizerFiles files = SentencePieceFiles();
  auto json = nlohmann::json::parse(files["tokenizer.json"]);
  for (auto& merge : json["model"]["merges"]) {
    merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
  }
  files["tokenizer.json"] = json.dump();
  ExpectGolden(files, "sentencepiece");
}

TEST(TextGoldensTest, FactsOfAVocabulary) {
  const auto byte_level = LoadOrDie(ByteLevelFiles());
  EXPECT_EQ(byte_level->vocab_size(), 1805u);
  EXPECT_EQ(byte_level->bos_token_id(), 1u);
  EXPECT_EQ(byte_level->eos_token_ids(), (std::vector<uint32_t>{2, 0}));
  EXPECT_EQ(byte_level->TokenText(2), "<|im_end|>");
  EXPECT_EQ(byte_level->TokenText(5000), "");
  const auto opt = LoadOrDie(OptFiles());
  EXPECT_EQ(opt->bos_token_id(), 2u);
  EXPECT_EQ(opt->eos_token_ids(), std::vector<uint32_t>{2});
  EXPECT_EQ(opt->Encode("", /*add_special_tokens=*/true).value(), std::vector<uint32_t>{2});
  EXPECT_EQ(opt->Encode("", /*add_special_tokens=*/false).value(), std::vector<uint32_t>{});
}

TEST(TextGoldensTest, OptConfigurationMayRefuseBos) {
  TokenizerFiles files = OptFiles();
  files["tokenizer_config.json"] = R"({"add_bos_token": false, "bos_token": {"content": "</s>"},
      "eos_token": "</s>", "pad_token": "<pad>"})";
  const auto opt = LoadOrDie(files);
  EXPECT_EQ(opt->Encode("", /*add_special_tokens=*/true).value(), std::vector<uint32_t>{});
}

}  // namespace
}  // namespace sluice::text
