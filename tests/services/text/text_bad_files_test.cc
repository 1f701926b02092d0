// Files and templates that must be refused with a Status (reliability.md F5, F17, F21, F22), and
// the limits of a request.
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/services/text/text_testdata.h"

namespace sluice::text {
namespace {

using absl::StatusCode;
using nlohmann::json;

json GoodTokenizer() { return json::parse(ByteLevelFiles()["tokenizer.json"]); }

// Expects Load to fail with `code` and a message that contains `says`.
void ExpectRefused(const TokenizerFiles& files, StatusCode code, const std::string& says) {
  const auto loaded = Tokenizer::Load(files);
  ASSERT_FALSE(loaded.ok()) << "wanted: " << says;
  EXPECT_EQ(loaded.status().code(), code) << loaded.status();
  EXPECT_NE(loaded.status().ToString().find(says), std::string::npos)
      << loaded.status() << "\nwanted: " << says;
}

void ExpectRefused(const json& tokenizer, StatusCode code, const std::string& says) {
  ExpectRefused(TokenizerFiles{{"tokenizer.json", tokenizer.dump()}}, code, says);
}

TEST(TextBadFilesTest, NothingToLoadSaysWhatIsThere) {
  ExpectRefused(TokenizerFiles{}, StatusCode::kNotFound, "nothing");
  ExpectRefused(TokenizerFiles{{"vocab.json", "{}"}}, StatusCode::kNotFound, "vocab.json");
}

TEST(TextBadFilesTest, NotJson) {
  for (const std::string content :
       {"", "{", "[]", "null", "{\"model\": 1}", "\xff\xfe", "{\"a\":1}x"}) {
    ExpectRefused(TokenizerFiles{{"tokenizer.json", content}}, StatusCode::kInvalidArgument,
                  "tokenizer.json");
  }
  ExpectRefused(TokenizerFiles{{"tokenizer.json", R"({"version":"1.0","model":"\ud800"})"}},
                StatusCode::kInvalidArgument, "not acceptable JSON");
}

TEST(TextBadFilesTest, JsonLimits) {
  ExpectRefused(TokenizerFiles{{"tokenizer.json", std::string(10000, '[')}},
                StatusCode::kInvalidArgument, "nested deeper");
  ExpectRefused(TokenizerFiles{{"tokenizer.json", R"({"model": 1, "model": 2})"}},
                StatusCode::kInvalidArgument, "twice");
  std::string many = "[0";
  for (int i = 0; i < 4000001; ++i) many += ",0";
  ExpectRefused(TokenizerFiles{{"tokenizer.json", many + "]"}}, StatusCode::kInvalidArgument,
                "memory");
  ExpectRefused(TokenizerFiles{{"tokenizer.json", std::string((64 << 20) + 1, ' ')}},
                StatusCode::kInvalidArgument, "limit");
}

TEST(TextBadFilesTest, RegexOutsideTheAllowList) {
  const json split = {{"type", "Split"}, {"behavior", "Isolated"}, {"invert", false}};
  for (const std::string pattern : {"(a+)+", "", "\\w+", "(?:(?:a*)*)*b"}) {
    json tokenizer = GoodTokenizer();
    tokenizer["pre_tokenizer"] = split;
    tokenizer["pre_tokenizer"]["pattern"]["Regex"] = pattern;
    ExpectRefused(tokenizer, StatusCode::kUnimplemented, "regex");
    tokenizer["pre_tokenizer"] = {{"type", "Sequence"},
                                  {"pretokenizers", json::array({tokenizer["pre_tokenizer"]})}};
    ExpectRefused(tokenizer, StatusCode::kUnimplemented, "regex");
    tokenizer = GoodTokenizer();
    tokenizer["normalizer"] = {
        {"type", "Replace"}, {"pattern", {{"Regex", pattern}}}, {"content", "b"}};
    ExpectRefused(tokenizer, StatusCode::kUnimplemented, "regex");
    tokenizer = GoodTokenizer();
    tokenizer["decoder"] = {
        {"type", "Replace"}, {"pattern", {{"Regex", pattern}}}, {"content", "b"}};
    ExpectRefused(tokenizer, StatusCode::kUnimplemented, "regex");
  }
}

TEST(TextBadFilesTest, PartsThatAreNotKnown) {
  for (const std::string key : {"normalizer", "pre_tokenizer", "post_processor", "decoder"}) {
    for (const json& part : {json{{"type", "Evil"}}, json{{"x", 1}}, json("ByteLevel"), json(7)}) {
      json tokenizer = GoodTokenizer();
      tokenizer[key] = part;
      ExpectRefused(tokenizer, StatusCode::kUnimplemented, key);
    }
    json tokenizer = GoodTokenizer();
    tokenizer[key] = {{"type", "Sequence"}};
    ExpectRefused(tokenizer, StatusCode::kInvalidArgument, key);
  }
}

TEST(TextBadFilesTest, TextThatGrows) {
  json tokenizer = GoodTokenizer();
  const json twice = {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aa"}};
  tokenizer["normalizer"] = {{"type", "Sequence"},
                             {"normalizers", json::array({twice, twice, twice, twice})}};
  ExpectRefused(tokenizer, StatusCode::kInvalidArgument, "multiply");
  tokenizer["normalizer"] = {{"type", "Replace"}, {"pattern", {{"String", ""}}}, {"content", "a"}};
  ExpectRefused(tokenizer, StatusCode::kInvalidArgument, "empty pattern");
  tokenizer["normalizer"] = {{"type", "Prepend"}, {"prepend", std::string(1000, 'a')}};
  ExpectRefused(tokenizer, StatusCode::kInvalidArgument, "prepends");
}

TEST(TextBadFilesTest, Ids) {
  for (const json& id :
       {json(2147483648u), json(1u << 21), json(-1), json(1.5), json("7"), json(nullptr)}) {
    json tokenizer = GoodTokenizer();
    tokenizer["model"]["vocab"]["zzz"] = id;
    ExpectRefused(tokenizer, StatusCode::kInvalidArgument, "token id");
    tokenizer = GoodTokenizer();
    tokenizer["added_tokens"][0]["id"] = id;
    ExpectRefused(tokenizer, StatusCode::kInvalidArgument, "token id");
  }
  json tokenizer = GoodTokenizer();
  tokenizer["model"]["vocab"]["zzz"] = 5;
  ExpectRefused(tokenizer, StatusCode::kInvalidArgument, "two tokens have the id 5");
  tokenizer = GoodTokenizer();
  tokenizer["post_processor"]["processors"][1]["special_tokens"]["<|im_start|>"]["ids"] = {
      2147483648u};
  ExpectRefused(tokenizer, StatusCode::kInvalidArgument, "post_processor");
}

TEST(TextBadFilesTest, AddedTokens) {
  json tokenizer = GoodTokenizer();
  tokenizer["added_tokens"][0]["content"] = "";
  ExpectRefused(tokenizer, StatusCode::kInvalidArgument, "empty");
  tokenizer = GoodTokenizer();
  tokenizer["added_tokens"][0].erase("content");
  ExpectRefused(tokenizer, StatusCode::kInvalidArgument, "content");
  tokenizer = GoodTokenizer();
  tokenizer["added_tokens"][1]["content"] = tokenizer["added_tokens"][0]["content"];
  ExpectRefused(tokenizer, StatusCode::kInvalidArgument, "twice");
  tokenizer = GoodTokenizer();
  tokenizer["added_tokens"][0]["id"] = 77;
  ExpectRefused(tokenizer, StatusCode::kInvalidArgument, "another id");
  tokenizer = GoodTokenizer();
  tokenizer["added_tokens"].back()["id"] = 20000;
  ExpectRefused(tokenizer, StatusCode::kInvalidArgument, "keep its id");
  tokenizer = GoodTokenizer();
  tokenizer["added_tokens"][0]["content"] = std::string(3000, 'x');
  ExpectRefused(tokenizer, StatusCode::kInvalidArgument, "longer");
}

TEST(TextBadFilesTest, Models) {
  json tokenizer = GoodTokenizer();
  tokenizer["model"]["type"] = "Unigram";
  ExpectRefused(tokenizer, StatusCode::kUnimplemented, "BPE");
  tokenizer = GoodTokenizer();
  tokenizer["model"]["dropout"] = 0.1;
  ExpectRefused(tokenizer, StatusCode::kUnimplemented, "dropout");
  tokenizer = GoodTokenizer();
  tokenizer["model"]["continuing_subword_prefix"] = "##";
  ExpectRefused(tokenizer, StatusCode::kUnimplemented, "continuing_subword_prefix");
  for (const json& merge :
       {json("a"), json("a b c"), json(7), json::array({"a"}), json::array({"a", 1})}) {
    tokenizer = GoodTokenizer();
    tokenizer["model"]["merges"].push_back(merge);
    ExpectRefused(tokenizer, StatusCode::kInvalidArgument, "not a pair");
  }
  tokenizer = GoodTokenizer();
  tokenizer["model"]["merges"].push_back(json::array({"q", "qqqq"}));
  ExpectRefused(tokenizer, StatusCode::kInvalidArgument, "not in the vocabulary");
  tokenizer = GoodTokenizer();
  tokenizer["model"]["vocab"] = json::object();
  ExpectRefused(tokenizer, StatusCode::kInvalidArgument, "empty");
  tokenizer = GoodTokenizer();
  tokenizer["version"] = "2.0";
  ExpectRefused(tokenizer, StatusCode::kUnimplemented, "version");
}

TEST(TextBadFilesTest, HugeNumberOfMerges) {
  TokenizerFiles files = OptFiles();
  std::string merges;
  for (int i = 0; i < (1 << 21) + 1; ++i) merges += "a b\n";
  files["merges.txt"] = merges;
  ExpectRefused(files, StatusCode::kInvalidArgument, "merges, the limit");
}

TEST(TextBadFilesTest, GgufVocabularies) {
  const auto changed = [](const char* key, const json& value) {
    json vocab = json::parse(GgufLlamaFiles()["gguf_vocab.json"]);
    vocab[key] = value;
    return TokenizerFiles{{"gguf_vocab.json", vocab.dump()}};
  };
  ExpectRefused(changed("model", "t5"), StatusCode::kUnimplemented, "gpt2, llama");
  ExpectRefused(changed("tokens", 5), StatusCode::kInvalidArgument, "tokens");
  ExpectRefused(changed("tokens", json::array({"a"})), StatusCode::kInvalidArgument, "token_type");
  ExpectRefused(changed("scores", json::array({1})), StatusCode::kInvalidArgument, "scores");
  ExpectRefused(changed("bos_token_id", 99999), StatusCode::kInvalidArgument, "bos_token_id");
  ExpectRefused(changed("eos_token_id", 4294967295u), StatusCode::kInvalidArgument, "token id");
  TokenizerFiles files = GgufGpt2Files("made-up");
  ExpectRefused(files, StatusCode::kUnimplemented, "smollm");
}

Tokenizer::ChatMessage User(const std::string& content) { return {"user", content}; }

void ExpectTemplateFails(const std::string& source, const std::string& says) {
  TokenizerFiles files = ByteLevelFiles();
  files["chat_template.jinja"] = source;
  const auto tokenizer = LoadOrDie(files);
  ASSERT_NE(tokenizer, nullptr) << source;
  const std::vector<Tokenizer::ChatMessage> messages = {User("hello"), User("you")};
  const auto prompt = tokenizer->ApplyChatTemplate(messages, true);
  ASSERT_FALSE(prompt.ok()) << source << "\n" << prompt->size() << " bytes";
  EXPECT_EQ(prompt.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(prompt.status().ToString().find(says), std::string::npos) << prompt.status();
}

TEST(TextBadFilesTest, TemplatesThatNeverEnd) {
  ExpectTemplateFails("{% for i in range(1000000000) %}{% endfor %}", "");
  ExpectTemplateFails(
      "{% for i in range(9999) %}{% for j in range(9999) %}{% set x = i %}{% endfor %}{% endfor %}",
      "steps");
  ExpectTemplateFails("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion");
  ExpectTemplateFails(
      "{% set ns = namespace(s='x') %}{% for i in range(99) %}"
      "{% set ns.s = ns.s + ns.s %}{% endfor %}",
      "steps");
  ExpectTemplateFails("{{ 'x' * 1000000000 }}", "");
  ExpectTemplateFails("{{ messages | map(attribute='content') | list * 1000000000 }}", "");
  ExpectTemplateFails("{% for i in range(9999) %}{{ 'y' * 1000 }}{% endfor %}", "longer than");
  ExpectTemplateFails("{{ 'x'.center(1000000000) }}", "");
  ExpectTemplateFails("{{ '%1000000000d' | format(1) }}", "");
  ExpectTemplateFails("{{ messages | tojson(indent=1000000000) * 1000000 }}", "");
}

TEST(TextBadFilesTest, TemplatesWithoutAWayOut) {
  ExpectTemplateFails("{% include '/etc/passwd' %}", "");
  ExpectTemplateFails("{{ ''.__class__.__mro__[1].__subclasses__() }}", "");
  ExpectTemplateFails("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "");
  ExpectTemplateFails("{{ raise_exception('my own words') }}", "my own words");
}

TEST(TextBadFilesTest, TemplatesThatDoNotCompile) {
  TokenizerFiles files = ByteLevelFiles();
  for (const std::string source : {"{% for %}", "{{ 1 +", "{% nonsense %}", "{% if x %}"}) {
    files["chat_template.jinja"] = source;
    ExpectRefused(files, StatusCode::kInvalidArgument, "chat template");
  }
  files["chat_template.jinja"] =
      "{{ " + std::string(20000, '(') + "1" + std::string(20000, ')') + " }}";
  ExpectRefused(files, StatusCode::kInvalidArgument, "chat template");
  files["chat_template.jinja"] = std::string((256 << 10) + 1, 'x');
  ExpectRefused(files, StatusCode::kInvalidArgument, "limit");
  files["chat_template.jinja"] = "\xff";
  ExpectRefused(files, StatusCode::kInvalidArgument, "UTF-8");
}

TEST(TextBadFilesTest, Requests) {
  const auto tokenizer = LoadOrDie(ByteLevelFiles());
  EXPECT_EQ(tokenizer->Encode("\xff", false).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(tokenizer->Encode(std::string((4 << 20) + 1, 'a'), false).status().code(),
            StatusCode::kInvalidArgument);
  const std::vector<uint32_t> ids = {1, 5000};
  EXPECT_EQ(tokenizer->Decode(ids, false).status().code(), StatusCode::kInvalidArgument);
}

// Each of these made some tokenizer take quadratic time or more.
TEST(TextBadFilesTest, LongTextsOfOneKindEncode) {
  for (const auto& files : {ByteLevelFiles(), GgufGpt2Files("llama-bpe"), SentencePieceFiles()}) {
    const auto tokenizer = LoadOrDie(files);
    for (const std::string unit : {"a", " ", "\n", "1", "<", "\u0301", "ab \n"}) {
      std::string text;
      const size_t size = unit == "a" || unit == " " ? 1 << 20 : 1 << 17;
      while (text.size() < size) text += unit;
      const auto ids = tokenizer->Encode(text, false);
      ASSERT_TRUE(ids.ok()) << ids.status();
      EXPECT_EQ(tokenizer->Decode(*ids, false).value(), text);
    }
  }
}

}  // namespace
}  // namespace sluice::text
