// StreamDecoder: pieces are valid UTF-8 at every stop, and together they are Decode() of all ids
// (reliability.md A5).
#include <cstdint>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/services/text/text_testdata.h"

namespace sluice::text {
namespace {

std::string Stream(const Tokenizer& tokenizer, const std::vector<uint32_t>& ids, bool skip) {
  StreamDecoder stream(&tokenizer, skip);
  std::string all;
  for (const uint32_t id : ids) {
    const std::string piece = stream.Add(id);
    EXPECT_TRUE(IsValidUtf8(piece)) << "at id " << id;
    all += piece;
  }
  const std::string last = stream.Finish();
  EXPECT_TRUE(IsValidUtf8(last));
  return all + last;
}

void ExpectStreamEqualsDecode(const Tokenizer& tokenizer) {
  for (uint64_t row = 0; row < 3000; ++row) {
    const std::vector<uint32_t> ids = RandomIds(row, tokenizer.vocab_size());
    for (const bool skip : {false, true}) {
      ASSERT_EQ(Stream(tokenizer, ids, skip), tokenizer.Decode(ids, skip).value()) << "row " << row;
    }
  }
  const StringGenerator generator;
  for (uint64_t i = 0; i < 2000; ++i) {
    const auto ids = tokenizer.Encode(generator.Make(i), /*add_special_tokens=*/true,
                                      /*parse_special=*/true);
    ASSERT_TRUE(ids.ok());
    ASSERT_EQ(Stream(tokenizer, *ids, true), tokenizer.Decode(*ids, true).value())
        << "string " << i;
  }
}

// Ids whose text is mostly single bytes, so that characters are cut everywhere and often invalid.
void ExpectStreamEqualsDecodeOnBytes(const Tokenizer& tokenizer, uint32_t first, uint32_t count) {
  for (uint64_t row = 0; row < 3000; ++row) {
    std::vector<uint32_t> ids = RandomIds(row, count + 2);
    for (uint32_t& id : ids) id += first;
    ASSERT_EQ(Stream(tokenizer, ids, false), tokenizer.Decode(ids, false).value()) << "row " << row;
  }
}

TEST(TextStreamTest, ByteLevel) { ExpectStreamEqualsDecode(*LoadOrDie(ByteLevelFiles())); }
TEST(TextStreamTest, SentencePiece) { ExpectStreamEqualsDecode(*LoadOrDie(SentencePieceFiles())); }
TEST(TextStreamTest, Opt) { ExpectStreamEqualsDecode(*LoadOrDie(OptFiles())); }
TEST(TextStreamTest, GgufSmollm) { ExpectStreamEqualsDecode(*LoadOrDie(GgufGpt2Files("smollm"))); }
TEST(TextStreamTest, GgufSentencePiece) { ExpectStreamEqualsDecode(*LoadOrDie(GgufLlamaFiles())); }

TEST(TextStreamTest, BytesOfByteLevel) {
  ExpectStreamEqualsDecodeOnBytes(*LoadOrDie(ByteLevelFiles()), 3, 256);
}
TEST(TextStreamTest, BytesOfSentencePiece) {
  ExpectStreamEqualsDecodeOnBytes(*LoadOrDie(SentencePieceFiles()), 3, 256);
}

TEST(TextStreamTest, RealTextInByteTokensArrivesWhole) {
  const auto tokenizer = LoadOrDie(SentencePieceFiles());
  for (const std::string text : {"a\U00020000b", "👩‍🚀", "你好 世界\n", "  two spaces"}) {
    const auto ids = tokenizer->Encode(text, /*add_special_tokens=*/false).value();
    EXPECT_EQ(Stream(*tokenizer, ids, false), text);
  }
}

TEST(TextStreamTest, AByteLevelCharacterComesWithItsLastByte) {
  const auto tokenizer = LoadOrDie(ByteLevelFiles());
  const auto ids = tokenizer->Encode("\U0002A6D6", /*add_special_tokens=*/false).value();
  ASSERT_GT(ids.size(), 1u) << "needs a character of several tokens";
  StreamDecoder stream(tokenizer.get(), false);
  for (size_t i = 0; i + 1 < ids.size(); ++i) EXPECT_EQ(stream.Add(ids[i]), "");
  EXPECT_EQ(stream.Add(ids.back()), "\U0002A6D6");
  EXPECT_EQ(stream.Finish(), "");
}

TEST(TextStreamTest, AnUnfinishedCharacterEndsAsReplacement) {
  const auto tokenizer = LoadOrDie(ByteLevelFiles());
  const auto ids = tokenizer->Encode("\U0002A6D6", /*add_special_tokens=*/false).value();
  StreamDecoder stream(tokenizer.get(), false);
  EXPECT_EQ(stream.Add(ids[0]), "");
  EXPECT_EQ(stream.Finish(), "\uFFFD");
}

TEST(TextStreamTest, IdsOutsideTheVocabularyHaveNoText) {
  const auto tokenizer = LoadOrDie(OptFiles());
  StreamDecoder stream(tokenizer.get(), false);
  EXPECT_EQ(stream.Add(50271), "");
  EXPECT_EQ(stream.Add(0xFFFFFFFFu), "");
  EXPECT_EQ(stream.Finish(), "");
}

// A decoder that is neither byte-level nor SentencePiece's goes through the window: text that ends
// in U+FFFD is held, and all of it comes out in the end.
TEST(TextStreamTest, OtherDecodersGoThroughAWindow) {
  TokenizerFiles files = SentencePieceFiles();
  auto json = nlohmann::json::parse(files["tokenizer.json"]);
  json["decoder"] = {{"type", "Metaspace"}, {"replacement", "▁"}, {"prepend_scheme", "always"}};
  files["tokenizer.json"] = json.dump();
  ExpectStreamEqualsDecode(*LoadOrDie(files));
}

}  // namespace
}  // namespace sluice::text
