#include "tests/fuzz/quantized_models.h"

namespace sluice::fuzz {
namespace {

using checkpoint::Bytes;
using checkpoint::Json;
using checkpoint::Repeat;
using checkpoint::TensorMap;
using checkpoint::TinyModel;

constexpr uint64_t kN = 32, kK = 64, kGroups = 2;  // mlp.down_proj

constexpr uint16_t kHalf = 0x3800;  // 0.5 as float16

TensorMap GptqParts(bool act_order) {
  TensorMap parts = {{"qweight", {"I32", {kK / 8, kN}, Repeat(0x76543210U, kK / 8 * kN)}},
                     {"qzeros", {"I32", {kGroups, kN / 8}, Repeat(0x77777777U, kGroups * kN / 8)}},
                     {"scales", {"F16", {kGroups, kN}, Repeat(kHalf, kGroups * kN)}}};
  if (act_order) {
    std::vector<int32_t> groups(kK);
    for (size_t i = 0; i < kK; ++i) groups[i] = static_cast<int32_t>(i % kGroups);
    parts["g_idx"] = {"I32", {kK}, Bytes(groups)};
  }
  return parts;
}

TensorMap AwqParts() {
  return {{"qweight", {"I32", {kK, kN / 8}, Repeat(0x75316420U, kK * kN / 8)}},
          {"qzeros", {"I32", {kGroups, kN / 8}, Repeat(0x88888888U, kGroups * kN / 8)}},
          {"scales", {"F16", {kGroups, kN}, Repeat(kHalf, kGroups * kN)}}};
}

TensorMap Nf4Parts(bool nested) {
  constexpr uint64_t kBlocks = kN * kK / 64;
  const Json state = {{"quant_type", "nf4"}, {"blocksize", 64},         {"shape", {kN, kK}},
                      {"dtype", "float16"},  {"nested_blocksize", 256}, {"nested_offset", 0.25}};
  const std::string text = state.dump();
  TensorMap parts = {{"weight", {"U8", {kN * kK / 2, 1}, Repeat<uint8_t>(0x7A, kN * kK / 2)}},
                     {"weight.absmax", {"F32", {kBlocks}, Repeat(0.5F, kBlocks)}},
                     {"weight.quant_state.bitsandbytes__nf4", {"U8", {text.size()}, text}}};
  if (nested) {
    parts["weight.absmax"] = {"U8", {kBlocks}, Repeat<uint8_t>(3, kBlocks)};
    parts["weight.nested_absmax"] = {"F32", {1}, Repeat(0.5F, 1)};
    parts["weight.nested_quant_map"] = {"F32", {256}, Repeat(0.125F, 256)};
  }
  return parts;
}

}  // namespace

TinyModel ModelOfKind(uint8_t kind) {
  TinyModel model = TinyModel::Llama();
  Json& quant = model.config["quantization_config"];
  switch (kind) {
    case 1:
    case 2:
      quant = {{"quant_method", "gptq"}, {"bits", 4}, {"group_size", 32}, {"desc_act", kind == 2}};
      model.Quantize("mlp.down_proj", GptqParts(kind == 2));
      break;
    case 3:
      quant = {{"quant_method", "awq"}, {"bits", 4}, {"group_size", 32}, {"version", "gemm"}};
      model.Quantize("mlp.down_proj", AwqParts());
      break;
    case 4:
    case 5:
      quant = {{"quant_method", "bitsandbytes"}, {"load_in_4bit", true}};
      model.Quantize("mlp.down_proj", Nf4Parts(kind == 5));
      break;
    default:
      model.config.erase("quantization_config");
      break;
  }
  return model;
}

}  // namespace sluice::fuzz
