// A model for tests: a small Llama's description with the byte-level tokenizer of
// tests/testdata/text. Ids 3 to 96 are the characters '!' to '~', one each.
#pragma once

#include <gtest/gtest.h>

#include <fstream>
#include <memory>
#include <sstream>
#include <string>

#include "services/controller/model_catalog.h"
#include "tests/services/plan/plan_models.h"

namespace sluice::controller {

inline std::string ReadTestFile(const std::string& name) {
  std::ifstream file(std::string(SLUICE_TESTDATA "/text/byte_level/") + name);
  std::ostringstream content;
  content << file.rdbuf();
  EXPECT_FALSE(content.str().empty()) << name;
  return content.str();
}

inline std::shared_ptr<const ServedModel> MakeTestModel() {
  internal::v1::PlanShardsResponse shards = plan::SmallLlama(4, 1 << 20, 1 << 20, false);
  shards.set_model_digest("digest");
  shards.mutable_config()->add_eos_token_ids(2);
  shards.mutable_config()->set_model_type("llama");
  text::TokenizerFiles files;
  files["tokenizer.json"] = ReadTestFile("tokenizer.json");
  files["tokenizer_config.json"] = ReadTestFile("tokenizer_config.json");
  auto model = MakeServedModel(std::move(shards), files, "tiny");
  EXPECT_TRUE(model.ok()) << model.status();
  return model.ok() ? *model : nullptr;
}

// Id of a character '!' to '~'.
inline uint32_t IdOf(char c) { return 3 + static_cast<uint32_t>(c - '!'); }
inline std::string TextOf(const std::vector<uint32_t>& ids) {
  std::string text;
  for (const uint32_t id : ids) {
    text += static_cast<char>('!' + (id - 3));
  }
  return text;
}

}  // namespace sluice::controller
