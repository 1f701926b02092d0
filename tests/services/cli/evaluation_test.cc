// The table of `sluice eval`.
#include "services/cli/evaluation.h"

#include <cmath>

#include "gtest/gtest.h"

namespace sluice::cli {
namespace {

EvalResult Result(const std::string& model, const std::string& format, double perplexity) {
  EvalResult result;
  result.model = model;
  result.format = format;
  result.weight_bytes = 3 << 19;  // 1.5 MiB
  result.perplexity.Add(-std::log(perplexity));
  result.best_prefill_speed = 1234.4;
  result.best_decode_speed = 56.78;
  return result;
}

TEST(EvalTableTest, DifferencesAreToTheFirstRow) {
  EXPECT_EQ(
      EvalTable({Result("m", "none, 16 bits", 20), Result("longer-name", "awq gemm, g64", 25),
                 Result("x", "gptq v1, g64", 19)}),
      "model        format         weights MiB  prefill t/s  decode t/s  perplexity  difference\n"
      "m            none, 16 bits          1.5         1234        56.8      20.000  +0.000 (+0.0 "
      "%)\n"
      "longer-name  awq gemm, g64          1.5         1234        56.8      25.000  +5.000 (+25.0 "
      "%)\n"
      "x            gptq v1, g64           1.5         1234        56.8      19.000  -1.000 (-5.0 "
      "%)\n");
}

TEST(EvalTableTest, NoResultsAreAHeadingOnly) {
  EXPECT_EQ(EvalTable({}),
            "model  format  weights MiB  prefill t/s  decode t/s  perplexity  difference\n");
}

}  // namespace
}  // namespace sluice::cli
