#include "services/checkpoint/quant_config.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"

namespace sluice::checkpoint {
namespace {

absl::Status Unsupported(const std::string& file, const std::string& what,
                         const std::string& way_out) {
  return absl::UnimplementedError(absl::StrCat(file, ": ", what, " is not supported; ", way_out));
}

constexpr char kUseSupported[] =
    "use a model quantized with GPTQ (4 bit), AWQ (gemm) or bitsandbytes (4 bit), or without "
    "quantization";

// One file's view, with the synonyms of older writers turned into one key each.
struct Source {
  std::string file;
  Json values;
};

void Rename(Json* values, const char* from, const char* to) {
  const auto it = values->find(from);
  if (it == values->end()) return;
  if (!values->contains(to)) (*values)[to] = *it;
}

Source MakeSource(const std::string& file, Json values) {
  Rename(&values, "w_bit", "bits");
  Rename(&values, "wbits", "bits");
  Rename(&values, "q_group_size", "group_size");
  Rename(&values, "method", "quant_method");
  Rename(&values, "format", "checkpoint_format");
  Rename(&values, "version", "checkpoint_format");
  if (!values.contains("sym") && values.contains("zero_point") &&
      values["zero_point"].is_boolean()) {
    values["sym"] = !values["zero_point"].get<bool>();
  }
  return {file, std::move(values)};
}

// The keys of all files: the first file that names a key wins.
Json Merge(const std::vector<Source>& sources, std::vector<std::string>* warnings) {
  static constexpr const char* kCompared[] = {"bits", "group_size",   "desc_act",
                                              "sym",  "quant_method", "checkpoint_format"};
  Json merged = Json::object();
  for (const Source& source : sources) {
    for (const auto& [key, value] : source.values.items()) {
      if (value.is_null()) continue;
      if (!merged.contains(key)) {
        merged[key] = value;
        continue;
      }
      const bool compared =
          std::find(std::begin(kCompared), std::end(kCompared), key) != std::end(kCompared);
      if (!compared || merged[key] == value || value.is_structured()) continue;
      warnings->push_back(absl::StrCat(source.file, ": ", key, " disagrees with ", sources[0].file,
                                       ", which is used"));
    }
  }
  return merged;
}

// Version of gptqmodel named in meta.quantizer ("gptqmodel:7.7.0", or a list of such): true from
// 0.9 on.
bool WrittenByNewGptqModel(const Json& merged) {
  const auto meta = merged.find("meta");
  if (meta == merged.end() || !meta->is_object()) return false;
  const auto quantizer = meta->find("quantizer");
  if (quantizer == meta->end()) return false;
  const Json list = quantizer->is_array() ? *quantizer : Json::array({*quantizer});
  for (const Json& entry : list) {
    if (!entry.is_string()) continue;
    const std::string text = absl::AsciiStrToLower(entry.get<std::string>());
    if (text.rfind("gptqmodel:", 0) != 0) continue;
    char* end = nullptr;
    const long major = std::strtol(text.c_str() + 10, &end, 10);
    const long minor = *end == '.' ? std::strtol(end + 1, nullptr, 10) : 0;
    if (major > 0 || minor >= 9) return true;
  }
  return false;
}

absl::Status CheckBits(JsonFields* fields) {
  const uint64_t bits = fields->UintOr("bits", 1, 8, 4);
  SLUICE_RETURN_IF_ERROR(fields->status());
  if (bits == 2 || bits == 3 || bits == 5 || bits == 6 || bits == 7 || bits == 8) {
    return Unsupported(fields->file(), absl::StrCat(bits, "-bit GPTQ or AWQ"),
                       "use a 4-bit version of the model");
  }
  if (bits != 4) fields->Fail("bits", "must be 2, 3, 4 or 8");
  return fields->status();
}

absl::Status ReadGroupSize(JsonFields* fields, int64_t* group_size) {
  *group_size = fields->IntOr("group_size", -1, 1 << 20, -1);
  const int64_t size = *group_size;
  if (size != -1 && (size < 8 || size % 8 != 0)) {
    fields->Fail("group_size", "must be -1 or a multiple of 8, as 32, 64 or 128");
  }
  return fields->status();
}

absl::Status ParseGptq(const Json& merged, JsonFields* fields, QuantConfig* config) {
  SLUICE_RETURN_IF_ERROR(CheckBits(fields));
  SLUICE_RETURN_IF_ERROR(ReadGroupSize(fields, &config->group_size));
  const std::string format = absl::AsciiStrToLower(fields->TextOr("checkpoint_format", "gptq"));
  const std::string pack = fields->TextOr("pack_dtype", "int32");
  const bool marlin = fields->BoolOr("is_marlin_format", false);
  const bool sym = fields->BoolOr("sym", true);
  fields->BoolOr("desc_act", false);  // The tensors tell; a broken file is refused all the same.
  SLUICE_RETURN_IF_ERROR(fields->status());
  if (marlin || format == "marlin") {
    return Unsupported(fields->file(), "the Marlin layout",
                       "use the GPTQ version of the model (checkpoint_format gptq or gptq_v2)");
  }
  if (format == "gptq_p") {
    return Unsupported(fields->file(), "planar GPTQ (gptq_p)",
                       "save the model with checkpoint_format gptq or gptq_v2");
  }
  if (format != "gptq" && format != "gptq_v2") {
    return Unsupported(fields->file(),
                       absl::StrCat("checkpoint_format \"", format.substr(0, 40), "\" of GPTQ"),
                       "known are gptq and gptq_v2");
  }
  if (pack != "int32" && pack != "torch.int32") {
    return Unsupported(fields->file(), absl::StrCat("pack_dtype \"", pack.substr(0, 40), "\""),
                       "save the model with pack_dtype int32");
  }
  config->bits = 4;
  config->symmetric = sym;
  config->zero_is_true = format == "gptq_v2";
  config->packed_zeros = !config->zero_is_true && !sym && WrittenByNewGptqModel(merged);
  const auto dynamic = merged.find("dynamic");
  config->mixed = dynamic != merged.end() && dynamic->is_object() && !dynamic->empty();
  if (!config->zero_is_true && !sym && !config->packed_zeros) {
    config->warnings.push_back(
        "asymmetric GPTQ in format v1 by an old or unknown writer: zeros are read as stored + 1 "
        "(up to 16); other readers take a stored 15 as 0");
  }
  return absl::OkStatus();
}

absl::Status ParseAwq(JsonFields* fields, QuantConfig* config) {
  SLUICE_RETURN_IF_ERROR(CheckBits(fields));
  SLUICE_RETURN_IF_ERROR(ReadGroupSize(fields, &config->group_size));
  const std::string version = absl::AsciiStrToLower(fields->TextOr("checkpoint_format", "gemm"));
  const std::string backend = absl::AsciiStrToLower(fields->TextOr("backend", ""));
  const bool sym = fields->BoolOr("sym", false);
  SLUICE_RETURN_IF_ERROR(fields->status());
  if (version != "gemm" || backend == "llm-awq") {
    return Unsupported(
        fields->file(),
        absl::StrCat("AWQ layout \"", version != "gemm" ? version.substr(0, 40) : backend, "\""),
        "use the version \"gemm\" of the model");
  }
  if (sym)
    config->warnings.push_back("zero_point is false, but AWQ gemm stores zeros: they are used");
  config->bits = 4;
  config->symmetric = sym;
  config->zero_is_true = true;
  return absl::OkStatus();
}

absl::Status ParseBnb(JsonFields* fields, QuantConfig* config) {
  const bool eight = fields->BoolOr("load_in_8bit", fields->BoolOr("_load_in_8bit", false));
  const bool four = fields->BoolOr("load_in_4bit", fields->BoolOr("_load_in_4bit", false));
  SLUICE_RETURN_IF_ERROR(fields->status());
  if (eight || !four) {
    return Unsupported(fields->file(), "bitsandbytes LLM.int8 (load_in_8bit)",
                       "use the 4-bit version of the model (nf4 or fp4)");
  }
  config->bits = 4;
  return absl::OkStatus();
}

absl::StatusOr<std::string> FindMethod(JsonFields* fields) {
  std::string method = absl::AsciiStrToLower(fields->TextOr("quant_method", ""));
  const bool side_file = fields->file() != "config.json";
  SLUICE_RETURN_IF_ERROR(fields->status());
  if (method.empty()) {  // Old files.
    const bool bnb = fields->Has("load_in_4bit") || fields->Has("load_in_8bit") ||
                     fields->Has("_load_in_4bit") || fields->Has("_load_in_8bit");
    if (bnb) return std::string("bitsandbytes");
    const std::string format = absl::AsciiStrToLower(fields->TextOr("checkpoint_format", ""));
    const bool awq = format.rfind("gem", 0) == 0 || fields->file() == "quant_config.json";
    if (fields->Has("bits")) return std::string(awq ? "awq" : "gptq");
    if (side_file) return std::string("gptq");
  }
  if (method == "auto-round" || method == "intel/auto-round") {
    const std::string packing = fields->TextOr("packing_format", "");
    if (packing == "auto_round:awq" || packing == "auto_round:auto_awq") return std::string("awq");
    if (packing == "auto_round:gptq" || packing == "auto_round:auto_gptq") {
      return std::string("gptq");
    }
  }
  return method;
}

}  // namespace

absl::StatusOr<QuantConfig> ParseQuantConfig(const QuantConfigFiles& files) {
  QuantConfig config;
  std::vector<Source> sources;
  JsonFields main(files.config, "config.json");
  Json inner = main.ObjectOr("quantization_config");
  if (inner.is_null() && main.Has("compression_config")) {
    return Unsupported("config.json", "compressed-tensors", kUseSupported);
  }
  SLUICE_RETURN_IF_ERROR(main.status());
  if (!inner.is_null()) sources.push_back(MakeSource("config.json", std::move(inner)));
  if (files.quantize_config.is_object()) {
    sources.push_back(MakeSource("quantize_config.json", files.quantize_config));
  }
  if (files.quant_config.is_object()) {
    sources.push_back(MakeSource("quant_config.json", files.quant_config));
  }
  if (sources.empty()) return config;
  const Json merged = Merge(sources, &config.warnings);
  JsonFields fields(merged, sources[0].file);
  SLUICE_ASSIGN_OR_RETURN(const std::string method, FindMethod(&fields));
  if (method == "gptq" || method == "marlin") {
    config.method = QuantMethod::kGptq;
    if (method == "marlin") return Unsupported(fields.file(), "the Marlin layout", kUseSupported);
    SLUICE_RETURN_IF_ERROR(ParseGptq(merged, &fields, &config));
  } else if (method == "awq") {
    config.method = QuantMethod::kAwq;
    SLUICE_RETURN_IF_ERROR(ParseAwq(&fields, &config));
  } else if (method == "bitsandbytes") {
    config.method = QuantMethod::kBitsAndBytes;
    SLUICE_RETURN_IF_ERROR(ParseBnb(&fields, &config));
  } else {
    return Unsupported(fields.file(), absl::StrCat("quant_method \"", method.substr(0, 40), "\""),
                       kUseSupported);
  }
  return config;
}

const char* NameOf(QuantMethod method) {
  switch (method) {
    case QuantMethod::kNone:
      return "none";
    case QuantMethod::kGptq:
      return "gptq";
    case QuantMethod::kAwq:
      return "awq";
    case QuantMethod::kBitsAndBytes:
      return "bitsandbytes";
  }
  return "unknown";
}

}  // namespace sluice::checkpoint
