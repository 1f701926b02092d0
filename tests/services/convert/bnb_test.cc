// NF4 and FP4 against files that bitsandbytes wrote from the same weights.
#include "services/convert/bnb.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "services/checkpoint/json.h"
#include "services/convert/output_tensor.h"
#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/convert/stored_parts.h"

namespace sluice::convert {
namespace {

using checkpoint::Checkpoint;
using checkpoint::TempDir;

std::vector<float> Floats(const std::string& bytes) {
  std::vector<float> values(bytes.size() / 4);
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

std::string Text(const Bytes& bytes) { return {bytes.begin(), bytes.end()}; }

// A file of bitsandbytes, and what we make of the unquantized model it was made from.
struct Pair {
  const char* base;
  const char* quantized;
  const char* type;
  bool nested;
};

// Calls `check` with parts and their stored twins for each linear that bitsandbytes quantized.
template <typename Check>
void ForEachLinear(const Pair& pair, int expected_linears, const Check& check) {
  SCOPED_TRACE(pair.quantized);
  const auto source = Checkpoint::Open(Stored(pair.base));
  ASSERT_TRUE(source.ok()) << source.status();
  const StoredParts stored(Stored(pair.quantized));
  ConvertOptions options;
  options.format = std::string(pair.type) == "nf4" ? Format::kNf4 : Format::kFp4;
  options.double_quant = pair.nested;
  const auto plan = PlanTensors(**source, options);
  ASSERT_TRUE(plan.ok()) << plan.status();
  int linears = 0;
  for (const PlannedTensor& planned : *plan) {
    const bool quantized = planned.encoding == PlannedTensor::Encoding::kBnb;
    const std::string& name = planned.parts[0].name;
    EXPECT_EQ(quantized, stored.set().Find(name + ".absmax") != nullptr) << name;
    if (!quantized) continue;
    ++linears;
    const auto rows = WeightRows::Open(**source, planned.index);
    ASSERT_TRUE(rows.ok());
    const auto parts = QuantizeBnb(*rows, pair.type, pair.nested);
    ASSERT_TRUE(parts.ok()) << parts.status();
    ASSERT_EQ(parts->size(), planned.parts.size());
    check(planned, *parts, stored);
  }
  EXPECT_EQ(linears, expected_linears);
}

TEST(BnbTest, PlainIsByteForByteWhatBitsandbytesWrote) {
  const auto same = [](const PlannedTensor& planned, const std::vector<Bytes>& parts,
                       const StoredParts& stored) {
    for (size_t i = 0; i < parts.size(); ++i) {
      EXPECT_TRUE(Text(parts[i]) == stored.Read(planned.parts[i].name)) << planned.parts[i].name;
      const checkpoint::StoredTensor* there = stored.set().Find(planned.parts[i].name);
      EXPECT_EQ(there->dtype.name, planned.parts[i].dtype);
      EXPECT_EQ(there->shape, planned.parts[i].shape);
    }
  };
  ForEachLinear({"llama-fp16", "llama-nf4", "nf4", false}, 14, same);
  ForEachLinear({"llama-fp16", "llama-fp4", "fp4", false}, 14, same);
  ForEachLinear({"opt-350m-style", "opt-350m-style-nf4", "nf4", false}, 8, same);
}

// bitsandbytes looks a nested scale up in a coarse table on a CPU and near a midpoint takes either
// neighbour: ours must be the nearest, and its own at most one code away.
void ExpectNearest(const std::vector<Bytes>& parts, const std::string& stored_codes,
                   size_t* other) {
  const std::vector<float>& map = BnbDynamicMap();
  const std::vector<float> outer = Floats(Text(parts[4]));
  for (size_t i = 0; i < parts[1].size(); ++i) {
    const int ours = parts[1][i], theirs = static_cast<uint8_t>(stored_codes[i]);
    if (ours == theirs) continue;
    ++*other;
    ASSERT_EQ(std::abs(ours - theirs), 1) << i;
    const float gap = std::abs(map[ours] - map[theirs]) * outer[i / kBnbNestedBlock];
    EXPECT_LE(gap, outer[i / kBnbNestedBlock] * 0.02F);
  }
}

TEST(BnbTest, NestedIsWhatBitsandbytesWroteBesideMidpoints) {
  for (const Pair& pair : {Pair{"llama-fp16", "llama-nf4-nested", "nf4", true},
                           Pair{"llama-fp16", "llama-fp4-nested", "fp4", true},
                           Pair{"opt-fp16", "opt-nf4-nested", "nf4", true}}) {
    size_t scales = 0, other = 0;
    const auto compare = [&](const PlannedTensor& planned, const std::vector<Bytes>& parts,
                             const StoredParts& stored) {
      for (const size_t i : {0, 2, 4, 5}) {  // weight, quant_map, nested_absmax, nested_quant_map
        EXPECT_TRUE(Text(parts[i]) == stored.Read(planned.parts[i].name)) << planned.parts[i].name;
      }
      const auto ours = checkpoint::ParseJsonObject(Text(parts[3]), "ours");
      const auto theirs =
          checkpoint::ParseJsonObject(stored.Read(planned.parts[3].name), "bitsandbytes");
      ASSERT_TRUE(ours.ok() && theirs.ok()) << ours.status() << theirs.status();
      EXPECT_EQ(*ours, *theirs);
      scales += parts[1].size();
      ExpectNearest(parts, stored.Read(planned.parts[1].name), &other);
    };
    ForEachLinear(pair, std::string(pair.base) == "opt-fp16" ? 12 : 14, compare);
    EXPECT_LE(other, scales / 200) << pair.quantized;
  }
}

TEST(BnbTest, StateHasOneLengthForEveryOffset) {
  const size_t length = BnbState("nf4", 8, 8, /*nested=*/true, 0).size();
  for (const double offset : {1.0, 6e-8, 65504.0, 0.1, 1.0 / 3}) {
    const std::string text = BnbState("nf4", 8, 8, /*nested=*/true, offset);
    EXPECT_EQ(text.size(), length);
    EXPECT_EQ(checkpoint::ParseJsonObject(text, "state")->at("nested_offset"), offset);
  }
}

// Distance of a weight to the nearest of the table: half the largest gap between neighbours, of the
// block's largest weight.
double WorstGap(const char* type) {
  std::vector<float> table(BnbTable(type), BnbTable(type) + 16);
  std::sort(table.begin(), table.end());
  double gap = 0;
  for (size_t i = 1; i < table.size(); ++i) gap = std::max<double>(gap, table[i] - table[i - 1]);
  return gap / 2;
}

// Rows of 24, 8 and `inner` weights, none a multiple of 64: blocks begin in the middle of rows, and
// the last one of most tensors is short. All weights lie in -1..1.
checkpoint::TinyModel UnevenModel(uint64_t inner) {
  checkpoint::TinyModel model;
  model.config = {{"model_type", "llama"},      {"hidden_size", 24},
                  {"num_attention_heads", 1},   {"head_dim", 8},
                  {"intermediate_size", inner}, {"vocab_size", 8},
                  {"num_hidden_layers", 1},     {"tie_word_embeddings", true}};
  const auto add = [&model](const std::string& name, const std::vector<uint64_t>& shape) {
    std::vector<uint16_t> halves(shape[0] * (shape.size() > 1 ? shape[1] : 1));
    for (size_t i = 0; i < halves.size(); ++i) {
      halves[i] = FloatToHalf(std::sin(static_cast<float>(7 * i + shape[0])));
    }
    model.tensors["model." + name + ".weight"] = {"F16", shape, checkpoint::Bytes(halves)};
  };
  add("embed_tokens", {8, 24});
  add("norm", {24});
  add("layers.0.input_layernorm", {24});
  add("layers.0.post_attention_layernorm", {24});
  for (const char* name : {"q_proj", "k_proj", "v_proj"}) {
    add(absl::StrCat("layers.0.self_attn.", name), {8, 24});
  }
  add("layers.0.self_attn.o_proj", {24, 8});
  add("layers.0.mlp.gate_proj", {inner, 24});
  add("layers.0.mlp.up_proj", {inner, 24});
  add("layers.0.mlp.down_proj", {24, inner});
  return model;
}

void ExpectReadsBackWithinTheTable(const checkpoint::TinyModel& model) {
  for (const char* type : {"nf4", "fp4"}) {
    for (const bool nested : {false, true}) {
      SCOPED_TRACE(absl::StrCat(type, nested ? " nested" : ""));
      const TempDir dir, out;
      const auto source = model.Open(dir);
      ASSERT_TRUE(source.ok()) << source.status();
      ConvertOptions options;
      options.format = std::string(type) == "nf4" ? Format::kNf4 : Format::kFp4;
      options.double_quant = nested;
      const std::string output = out.path() + "/x";
      const auto result = Convert(**source, options, output, [](auto, auto) { return true; });
      ASSERT_TRUE(result.ok()) << result.status();
      EXPECT_EQ(result->quantized, 7U);
      const auto written = Checkpoint::Open(output);
      ASSERT_TRUE(written.ok()) << written.status();
      for (int i = 0; i < (*source)->description().tensors_size(); ++i) {
        const auto matrix = (*written)->Read(i);
        ASSERT_TRUE(matrix.ok()) << matrix.status();
        const bool plain = matrix->spec.format == QuantFormat::kPlain;
        // A nested scale is off by half the widest step of its map, 0.0071, at most.
        const double bound = plain ? 0 : WorstGap(type) + (nested ? 0.0071 : 0) + 1e-6;
        const auto before = checkpoint::Dequantize(*(*source)->Read(i));
        const auto after = checkpoint::Dequantize(*matrix);
        for (size_t j = 0; j < before.size(); ++j) {
          ASSERT_LE(std::abs(before[j] - after[j]), bound) << i << " " << j;
        }
      }
    }
  }
}

TEST(BnbTest, BlocksThatCrossRows) { ExpectReadsBackWithinTheTable(UnevenModel(40)); }

// 1.2 million weights are read in two slabs, and a block lies in both.
TEST(BnbTest, BlocksThatCrossSlabs) { ExpectReadsBackWithinTheTable(UnevenModel(50'008)); }

TEST(BnbTest, ZerosStayZeros) {
  checkpoint::TinyModel model = UnevenModel(40);
  std::string& data = model.tensors["model.layers.0.mlp.up_proj.weight"].data;
  data.assign(data.size(), '\0');
  const TempDir dir;
  const auto source = model.Open(dir);
  ASSERT_TRUE(source.ok()) << source.status();
  for (const char* type : {"nf4", "fp4"}) {
    const auto rows = WeightRows::Open(**source, 8);  // up_proj
    ASSERT_TRUE(rows.ok());
    ASSERT_EQ(rows->name(), "layers.0.mlp.up_proj.weight");
    const auto parts = QuantizeBnb(*rows, type, /*nested=*/true);
    ASSERT_TRUE(parts.ok()) << parts.status();
    for (const uint8_t byte : (*parts)[0]) {
      EXPECT_EQ(BnbTable(type)[byte >> 4], 0);
      EXPECT_EQ(BnbTable(type)[byte & 15], 0);
    }
  }
}

}  // namespace
}  // namespace sluice::convert
