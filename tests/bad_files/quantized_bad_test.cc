// Quantized tensors whose shapes, types or values are wrong, in a model that is sound otherwise.
#include <gtest/gtest.h>

#include <limits>

#include "tests/bad_files/bad_file.h"
#include "tests/fuzz/quantized_models.h"

namespace sluice::bad_files {
namespace {

using checkpoint::BuiltTensor;
using checkpoint::Repeat;
using checkpoint::TensorMap;
using checkpoint::TinyModel;

constexpr char kBase[] = "model.layers.0.mlp.down_proj.";
constexpr char kFile[] = "model.safetensors";
enum Kind : uint8_t { kGptq = 1, kActOrder = 2, kAwq = 3, kNf4 = 4, kNested = 5 };

using Change = std::function<void(TensorMap&)>;
std::function<void(const TempDir&)> With(Kind kind, const Change& change) {
  return [=](const TempDir& dir) {
    TinyModel model = fuzz::ModelOfKind(kind);
    change(model.tensors);
    model.Write(dir);
  };
}
std::function<void(const TempDir&)> Part(Kind kind, const char* part, const BuiltTensor& tensor) {
  return With(kind, [=](TensorMap& t) { t[std::string(kBase) + part] = tensor; });
}
std::function<void(const TempDir&)> Without(Kind kind, const char* part) {
  return With(kind, [=](TensorMap& t) { t.erase(std::string(kBase) + part); });
}
// Element number `index` of a part gets these bytes.
template <typename T>
std::function<void(const TempDir&)> Element(Kind kind, const char* part, size_t index, T value) {
  return With(kind, [=](TensorMap& t) {
    std::memcpy(t.at(std::string(kBase) + part).data.data() + index * sizeof(T), &value, sizeof(T));
  });
}
BuiltTensor I32(const std::vector<uint64_t>& shape) {
  size_t count = 1;
  for (const uint64_t dim : shape) count *= dim;
  return {"I32", shape, std::string(count * 4, '\0')};
}

constexpr uint16_t kHalfNan = 0x7E00, kHalfInf = 0x7C00;
const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInf = std::numeric_limits<float>::infinity();

// NOLINTNEXTLINE(readability-function-size): a table
TEST(BadFilesTest, GptqTensors) {
  const auto g_idx = [](int32_t value) {
    // GPTQModel #2949: a group index out of range is an out-of-bounds read on the GPU.
    return BadFile{"F18",
                   "g_idx[17] = " + std::to_string(value),
                   Element<int32_t>(kActOrder, "g_idx", 17, value),
                   {kFile, "down_proj.g_idx[17]", "outside the groups"}};
  };
  ExpectRefused(
      "quantized tensors",
      {
          g_idx(2),
          g_idx(-1),
          g_idx(std::numeric_limits<int32_t>::max()),
          g_idx(std::numeric_limits<int32_t>::min()),
          g_idx(64),
          {"F18",
           "all columns in one group",
           Part(kActOrder, "g_idx", I32({64})),
           {kFile, "g_idx", "has not 32 columns"}},
          {"F18",
           "one column too many in a group",
           Element<int32_t>(kActOrder, "g_idx", 1, 0),
           {kFile, "g_idx", "has not 32 columns"}},
          {"F18", "g_idx one short", Part(kActOrder, "g_idx", I32({63})), {kFile, "g_idx", "[63]"}},
          {"F18", "g_idx one long", Part(kActOrder, "g_idx", I32({65})), {kFile, "g_idx", "[65]"}},
          {"F18",
           "g_idx of 64 bits",
           Part(kActOrder, "g_idx", {"I64", {64}, std::string(512, '\0')}),
           {kFile, "g_idx", "I64"}},
          {"F18",
           "g_idx of floats",
           Part(kActOrder, "g_idx", {"F32", {64}, std::string(256, '\0')}),
           {kFile, "g_idx", "F32"}},
          {"F18",
           "g_idx with two dimensions",
           Part(kActOrder, "g_idx", I32({8, 8})),
           {kFile, "g_idx", "[8, 8]"}},
          {"F18", "empty g_idx", Part(kActOrder, "g_idx", {"I32", {0}, ""}), {kFile}},
          {"F19",
           "qzeros one column short",
           Part(kGptq, "qzeros", I32({2, 3})),
           {kFile, "qzeros", "[2, 3]", "[2, 4]"}},
          {"F19", "qzeros one group short", Part(kGptq, "qzeros", I32({1, 4})), {kFile, "qzeros"}},
          {"F19",
           "qzeros of floats",
           Part(kGptq, "qzeros", {"F32", {2, 4}, std::string(32, '\0')}),
           {kFile, "qzeros", "F32"}},
          {"F19", "qzeros transposed", Part(kGptq, "qzeros", I32({4, 2})), {kFile, "qzeros"}},
          {"F19", "no qzeros", Without(kGptq, "qzeros"), {"down_proj.qzeros is missing"}},
          {"F19", "no scales", Without(kGptq, "scales"), {"down_proj.scales is missing"}},
          {"F19",
           "scales one row short",
           Part(kGptq, "scales", {"F16", {2, 31}, std::string(124, '\0')}),
           {kFile, "scales"}},
          {"F19",
           "scales of whole numbers",
           Part(kGptq, "scales", {"I16", {2, 32}, std::string(128, '\0')}),
           {kFile, "scales", "I16"}},
          {"F19",
           "scales of 64 bits",
           Part(kGptq, "scales", {"F64", {2, 32}, std::string(512, '\0')}),
           {kFile, "scales", "F64"}},
          {"F19",
           "scales of 8 bits",
           Part(kGptq, "scales", {"F8_E4M3", {2, 32}, std::string(64, '\0')}),
           {kFile, "scales"}},
          {"F19",
           "scales with one dimension",
           Part(kGptq, "scales", {"F16", {64}, std::string(128, '\0')}),
           {kFile, "scales"}},
          {"F19",
           "qweight of 64 bits",
           Part(kGptq, "qweight", {"I64", {8, 32}, std::string(2048, '\0')}),
           {kFile, "qweight"}},
          {"F19", "qweight transposed", Part(kGptq, "qweight", I32({32, 8})), {kFile, "qweight"}},
          {"F19",
           "qweight of 8 bits a value",
           Part(kGptq, "qweight", I32({16, 32})),
           {"down_proj.qweight", "8-bit GPTQ"},
           kUnimplemented},
          {"F19",
           "qweight one row short",
           Part(kGptq, "qweight", I32({7, 32})),
           {kFile, "qweight"}},
          {"F19", "qweight with no rows", Part(kGptq, "qweight", {"I32", {0, 32}, ""}), {kFile}},
          {"F19",
           "a bias that the architecture has not",
           Part(kGptq, "bias", {"F16", {32}, Repeat<uint16_t>(0x3C00, 32)}),
           {kFile, "down_proj.bias"}},
          {"F20",
           "a scale that is not a number",
           Element(kGptq, "scales", 0, kHalfNan),
           {"down_proj", "scales[0]"}},
          {"F20",
           "an infinite scale",
           Element(kGptq, "scales", 33, kHalfInf),
           {"down_proj", "scales["}},
          {"F20",
           "a negative infinite scale",
           Element<uint16_t>(kGptq, "scales", 63, 0xFC00),
           {"down_proj", "scales["}},
          {"F16",
           "Marlin's B beside the weights",
           Part(kGptq, "B", I32({1, 1})),
           {"down_proj.B", "Marlin"},
           kUnimplemented},
          {"F16",
           "LLM.int8's SCB",
           Part(kGptq, "SCB", {"F32", {32}, std::string(128, '\0')}),
           {"down_proj.SCB", "LLM.int8"},
           kUnimplemented},
          {"F16",
           "weight_packed of compressed-tensors",
           Part(kGptq, "weight_packed", I32({1, 1})),
           {"down_proj.weight_packed", "compressed-tensors"},
           kUnimplemented},
      });
}

TEST(BadFilesTest, AwqTensors) {
  ExpectRefused(
      "quantized tensors",
      {
          {"F19",
           "AWQ qweight of GPTQ's shape",
           Part(kAwq, "qweight", I32({8, 32})),
           {kFile, "qweight", "[8, 32]", "[64, 4]"}},
          {"F19",
           "AWQ qweight one column short",
           Part(kAwq, "qweight", I32({64, 3})),
           {kFile, "qweight"}},
          {"F19",
           "AWQ qweight of 16 bits (gemv_fast)",
           Part(kAwq, "qweight", {"I16", {64, 4}, std::string(512, '\0')}),
           {"qweight", "gemv_fast"},
           kUnimplemented},
          {"F19",
           "AWQ qzeros one group short",
           Part(kAwq, "qzeros", I32({1, 4})),
           {kFile, "qzeros"}},
          {"F19",
           "AWQ qzeros one column long",
           Part(kAwq, "qzeros", I32({2, 5})),
           {kFile, "qzeros"}},
          {"F19", "no AWQ qzeros", Without(kAwq, "qzeros"), {"down_proj.qzeros is missing"}},
          {"F19", "no AWQ scales", Without(kAwq, "scales"), {"down_proj.scales is missing"}},
          {"F19",
           "AWQ scales of 32 bits",
           Part(kAwq, "scales", {"F32", {2, 32}, std::string(256, '\0')}),
           {kFile, "scales", "F32"}},
          {"F19",
           "AWQ scales transposed",
           Part(kAwq, "scales", {"F16", {32, 2}, std::string(128, '\0')}),
           {kFile, "scales"}},
          {"F16",
           "llm-awq's scaled_zeros",
           Part(kAwq, "scaled_zeros", {"F16", {2, 32}, std::string(128, '\0')}),
           {"scaled_zeros", "llm-awq"},
           kUnimplemented},
          {"F20",
           "an AWQ scale that is not a number",
           Element(kAwq, "scales", 1, kHalfNan),
           {"down_proj", "scales["}},
          {"F20",
           "an infinite AWQ scale",
           Element(kAwq, "scales", 63, kHalfInf),
           {"down_proj", "scales["}},
      });
}

std::function<void(const TempDir&)> State(const std::string& json, Kind kind = kNf4) {
  return Part(kind, "weight.quant_state.bitsandbytes__nf4", {"U8", {json.size()}, json});
}

// NOLINTNEXTLINE(readability-function-size): a table
TEST(BadFilesTest, BitsAndBytesTensors) {
  constexpr char kState[] = "quant_state.bitsandbytes__nf4";
  ExpectRefused(
      "quantized tensors",
      {
          {"F19",
           "absmax one block short",
           Part(kNf4, "weight.absmax", {"F32", {31}, std::string(124, '\0')}),
           {kFile, "absmax", "[31]", "[32]"}},
          {"F19",
           "absmax of 16 bits",
           Part(kNf4, "weight.absmax", {"F16", {32}, std::string(64, '\0')}),
           {kFile, "absmax"}},
          {"F19",
           "absmax with two dimensions",
           Part(kNf4, "weight.absmax", {"F32", {32, 1}, std::string(128, '\0')}),
           {kFile, "absmax"}},
          {"F19", "no absmax", Without(kNf4, "weight.absmax"), {"down_proj.weight", "absmax"}},
          {"F19", "no weight", Without(kNf4, "weight"), {"down_proj.weight"}},
          {"F19",
           "weight one byte short",
           Part(kNf4, "weight", {"U8", {1023, 1}, std::string(1023, '\0')}),
           {kFile, "1023 bytes"}},
          {"F19",
           "weight of twice the bytes",
           Part(kNf4, "weight", {"U8", {2048, 1}, std::string(2048, '\0')}),
           {kFile, "2048 bytes"}},
          {"F19",
           "code table of 15",
           Part(kNf4, "weight.quant_map", {"F32", {15}, std::string(60, '\0')}),
           {kFile, "quant_map", "[15]"}},
          {"F19",
           "code table of 16 bits",
           Part(kNf4, "weight.quant_map", {"F16", {16}, std::string(32, '\0')}),
           {kFile, "quant_map"}},
          {"F20",
           "code table with NaN",
           Part(kNf4, "weight.quant_map", {"F32", {16}, Repeat(kNan, 16)}),
           {"down_proj", "table holds"}},
          {"F20",
           "absmax not a number",
           Element(kNf4, "weight.absmax", 17, kNan),
           {kFile, "absmax[17]", "finite"}},
          {"F20", "absmax infinite", Element(kNf4, "weight.absmax", 0, kInf), {kFile, "absmax[0]"}},
          {"F20",
           "absmax negative",
           Element(kNf4, "weight.absmax", 31, -1.0F),
           {kFile, "absmax[31]", "not negative"}},
          {"F19",
           "nested absmax one block short",
           Part(kNested, "weight.absmax", {"U8", {31}, std::string(31, '\0')}),
           {kFile, "absmax"}},
          {"F19",
           "nested absmax left as floats",
           Part(kNested, "weight.absmax", {"F32", {32}, std::string(128, '\0')}),
           {kFile, "absmax"}},
          {"F19",
           "nested outer absmax of two",
           Part(kNested, "weight.nested_absmax", {"F32", {2}, std::string(8, '\0')}),
           {kFile, "nested_absmax"}},
          {"F19",
           "no nested table",
           Without(kNested, "weight.nested_quant_map"),
           {"nested_quant_map is missing"}},
          {"F19",
           "nested table of 255",
           Part(kNested, "weight.nested_quant_map", {"F32", {255}, std::string(1020, '\0')}),
           {kFile, "nested_quant_map"}},
          {"F20",
           "nested table with NaN",
           Element(kNested, "weight.nested_quant_map", 3, kNan),
           {kFile, "absmax["}},
          {"F20",
           "nested outer absmax infinite",
           Element(kNested, "weight.nested_absmax", 0, kInf),
           {kFile, "absmax["}},
          {"F20",
           "nested product clearly negative",
           Element(kNested, "weight.nested_quant_map", 3, -100.0F),
           {kFile, "absmax["}},
          {"F16", "state not JSON", State("x"), {kFile, kState, "broken JSON"}},
          {"F16", "state empty", State(" "), {kFile, kState, "broken JSON"}},
          {"F16", "state a list", State("[]"), {kFile, kState, "one JSON object"}},
          {"F16",
           "state of 70,000 bytes",
           State(std::string(70'000, ' ')),
           {kFile, kState, "65536"}},
          {"F16",
           "state of floats",
           Part(kNf4, "weight.quant_state.bitsandbytes__nf4", {"F32", {1}, "1234"}),
           {kFile, kState, "U8"}},
          {"F16",
           "no block size",
           State(R"({"quant_type":"nf4","shape":[32,64]})"),
           {kFile, "blocksize is missing"}},
          {"F16",
           "block size 0",
           State(R"({"blocksize":0,"shape":[32,64]})"),
           {kFile, "blocksize"}},
          {"F16",
           "block size 65",
           State(R"({"blocksize":65,"shape":[32,64]})"),
           {kFile, "power of two"}},
          {"F16",
           "block size 2^40",
           State(R"({"blocksize":1099511627776,"shape":[32,64]})"),
           {kFile, "blocksize"}},
          {"F16",
           "another shape",
           State(R"({"blocksize":64,"shape":[64,32]})"),
           {kFile, "shape", "[32, 64]"}},
          {"F16", "no shape", State(R"({"blocksize":64})"), {kFile, "shape"}},
          {"F16", "shape a string", State(R"({"blocksize":64,"shape":"32,64"})"), {kFile, "shape"}},
          {"F16",
           "type against the name",
           State(R"({"quant_type":"fp4","blocksize":64,"shape":[32,64]})"),
           {kFile, "quant_type"}},
          {"F16",
           "nested block size 0",
           State(R"({"blocksize":64,"nested_blocksize":0,"shape":[32,64]})", kNested),
           {kFile, "nested_blocksize"}},
          {"F16",
           "nested offset a string",
           State(R"({"blocksize":64,"nested_offset":"0","shape":[32,64]})", kNested),
           {kFile, "nested_offset"}},
          {"F16",
           "nested offset 1e300",
           State(R"({"blocksize":64,"nested_offset":1e300,"shape":[32,64]})", kNested),
           {kFile, "nested_offset"}},
          {"F16",
           "nested floats of 16 bits",
           State(R"({"blocksize":64,"nested_dtype":"float16","shape":[32,64]})", kNested),
           {kFile, "nested_dtype"}},
      });
}

// NOLINTNEXTLINE(readability-function-size): a table
TEST(BadFilesTest, PlainTensors) {
  const auto element = [](const std::string& name, size_t index, uint16_t bits) {
    return [=](const TempDir& dir) {
      TinyModel model = TinyModel::Llama();
      std::memcpy(model.tensors.at(name).data.data() + 2 * index, &bits, 2);
      model.Write(dir);
    };
  };
  const auto changed = [](const std::function<void(TinyModel&)>& change) {
    return [=](const TempDir& dir) {
      TinyModel model = TinyModel::Llama();
      change(model);
      model.Write(dir);
    };
  };
  ExpectRefused(
      "plain tensors",
      {
          {"F20",
           "NaN in a norm",
           element("model.norm.weight", 31, kHalfNan),
           {"norm.weight", "element 31 is not finite"}},
          {"F20",
           "NaN in the table",
           element("model.embed_tokens.weight", 0, kHalfNan),
           {"embed_tokens.weight", "element 0"}},
          {"F20",
           "infinity in layer 0",
           element("model.layers.0.mlp.up_proj.weight", 100, kHalfInf),
           {"layers.0.mlp.up_proj.weight", "element 100"}},
          {"F20",
           "NaN with a sign",
           element("model.layers.0.self_attn.q_proj.weight", 7, 0xFE01),
           {"q_proj.weight", "element 7"}},
          {"F19",
           "weights of whole numbers",
           changed([](TinyModel& m) {
             m.tensors["model.norm.weight"] = {"I16", {32}, std::string(64, '\0')};
           }),
           {kFile, "model.norm.weight", "I16"},
           kUnimplemented},
          {"F19",
           "weights of 64 bits",
           changed([](TinyModel& m) {
             m.tensors["model.norm.weight"] = {"F64", {32}, std::string(256, '\0')};
           }),
           {kFile, "model.norm.weight", "F64"},
           kUnimplemented},
          {"F19",
           "weights of 8 bits",
           changed([](TinyModel& m) {
             m.tensors["model.norm.weight"] = {"F8_E4M3", {32}, std::string(32, '\0')};
           }),
           {kFile, "model.norm.weight", "F8_E4M3"},
           kUnimplemented},
          {"F15",
           "no table",
           changed([](TinyModel& m) { m.tensors.erase("model.embed_tokens.weight"); }),
           {"embed_tokens.weight is missing"}},
          {"F15",
           "no norm",
           changed([](TinyModel& m) { m.tensors.erase("model.norm.weight"); }),
           {"model.norm.weight is missing"}},
          {"F15",
           "no v_proj",
           changed([](TinyModel& m) { m.tensors.erase("model.layers.0.self_attn.v_proj.weight"); }),
           {"v_proj.weight is missing"}},
          {"F16",
           "a norm with two dimensions",
           changed([](TinyModel& m) {
             m.tensors["model.norm.weight"].shape = {1, 32};
           }),
           {kFile, "model.norm.weight", "[1, 32]"}},
          {"F16",
           "a transposed projection",
           changed([](TinyModel& m) {
             m.tensors["model.layers.0.mlp.up_proj.weight"].shape = {32, 64};
           }),
           {kFile, "up_proj.weight", "[32, 64]", "[64, 32]"}},
          {"F16",
           "qweight without a configuration",
           changed([](TinyModel& m) {
             m.Quantize("mlp.up_proj", {{"qweight", I32({4, 64})}});
           }),
           {"up_proj.qweight", "quantization_config"}},
      });
}

}  // namespace
}  // namespace sluice::bad_files
