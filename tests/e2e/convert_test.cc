// The default model through sluice convert and sluice eval, as the README's table is made.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/e2e/process.h"

namespace sluice::e2e {
namespace {

namespace fs = std::filesystem;

class ConvertedModelTest : public testing::Test {
 protected:
  void SetUp() override {
    const char* model = std::getenv("SLUICE_MODEL");
    ASSERT_NE(model, nullptr)
        << "run the tests with ./dev test, which fetches the model and sets SLUICE_MODEL";
    model_ = model;
    folder_ = testing::TempDir() + "convert-" + std::to_string(getpid());
    fs::create_directory(folder_);
  }
  void TearDown() override {
    if (!folder_.empty()) fs::remove_all(folder_);
  }
  // Output of a `sluice` command that must end with `code`.
  std::string Sluice(std::vector<std::string> arguments, int code) {
    const std::string log = folder_ + "/log";
    fs::remove(log);
    arguments.insert(arguments.begin(), std::string(SLUICE_BIN) + "/sluice");
    Process process(arguments, log);
    EXPECT_EQ(process.Wait(240), code);
    std::ifstream file(log);
    std::string output{std::istreambuf_iterator<char>(file), {}};
    EXPECT_TRUE(code != 0 || !output.empty());
    return output;
  }
  std::string model_;
  std::string folder_;
};

// transformers 5.24 in float32, on the file's weights and on those of the converted folder, gives
// 29.237692 (tests/testdata/perplexity.py) and 35.639 (tests/testdata/convert/results.txt).
TEST_F(ConvertedModelTest, TableHasThePerplexitiesOfTransformers) {
  const std::string nf4 = folder_ + "/smollm2-nf4";
  Sluice({"convert", model_, "--to", "nf4", "--output", nf4}, 0);
  EXPECT_NE(Sluice({"convert", model_, "--to", "nf4", "--output", nf4}, 1).find("not overwritten"),
            std::string::npos);
  const std::string output =
      Sluice({"eval", "--model", model_, "--model", nf4, "--file",
              SLUICE_TESTDATA "/text/perplexity.txt", "--runs", "1", "--json"},
             0);
  const size_t begin = output.find("[\n");
  ASSERT_NE(begin, std::string::npos) << output;
  const nlohmann::json results =
      nlohmann::json::parse(output.substr(begin, output.rfind(']') + 1 - begin), nullptr,
                            /*allow_exceptions=*/false);
  ASSERT_EQ(results.size(), 2U) << output;
  EXPECT_EQ(results[0]["format"], "gguf Q4_1, g32");
  EXPECT_EQ(results[1]["format"], "bitsandbytes nf4, g64");
  EXPECT_EQ(results[1]["model"], "smollm2-nf4");
  EXPECT_NEAR(results[0]["perplexity"].get<double>(), 29.237692, 2e-3);
  EXPECT_NEAR(results[1]["perplexity"].get<double>(), 35.639, 2e-3);
  // Half a byte a weight and a float32 a block of 64; table and norms in float16.
  const uint64_t linears = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536);
  const uint64_t plain = 2 * (49152 * 576 + 61 * 576), tables = 210 * 64;
  EXPECT_EQ(results[1]["weight_bytes"], linears / 2 + linears / 64 * 4 + plain + tables);
  EXPECT_GT(results[1]["best_decode_tokens_per_second"], 0);
}

}  // namespace
}  // namespace sluice::e2e
