#include "services/checkpoint/source_dtype.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace sluice::checkpoint {

absl::StatusOr<SourceDType> SafetensorsDType(const std::string& name) {
  static constexpr struct {
    const char* name;
    uint64_t bytes;
  } kTypes[] = {{"BOOL", 1},    {"U8", 1},  {"I8", 1},  {"F8_E5M2", 1}, {"F8_E4M3", 1}, {"I16", 2},
                {"F8_E8M0", 1}, {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},     {"U32", 4},
                {"F32", 4},     {"I64", 8}, {"U64", 8}, {"F64", 8},     {"C64", 8}};
  for (const auto& type : kTypes) {
    if (name == type.name) return SourceDType{name, 1, type.bytes};
  }
  return absl::UnimplementedError(absl::StrCat("dtype \"", name.substr(0, 40),
                                               "\" is not supported; save the model as float16, "
                                               "bfloat16 or float32, or as GPTQ, AWQ or "
                                               "bitsandbytes 4 bit"));
}

absl::StatusOr<SourceDType> GgufDType(uint32_t number) {
  switch (number) {
    case 0:
      return SourceDType{"F32", 1, 4};
    case 1:
      return SourceDType{"F16", 1, 2};
    case 2:
      return SourceDType{"Q4_0", 32, 18};
    case 3:
      return SourceDType{"Q4_1", 32, 20};
    case 8:
      return SourceDType{"Q8_0", 32, 34};
    case 30:
      return SourceDType{"BF16", 1, 2};
    default:
      break;
  }
  static constexpr const char* kOthers[] = {
      "",         "",         "",        "",      "Q4_2",   "Q4_3",  "Q5_0",  "Q5_1",
      "",         "Q8_1",     "Q2_K",    "Q3_K",  "Q4_K",   "Q5_K",  "Q6_K",  "Q8_K",
      "IQ2_XXS",  "IQ2_XS",   "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS",
      "I8",       "I16",      "I32",     "I64",   "F64",    "IQ1_M", "",      "Q4_0_4_4",
      "Q4_0_4_8", "Q4_0_8_8", "TQ1_0",   "TQ2_0"};
  constexpr uint32_t kKnown = sizeof(kOthers) / sizeof(kOthers[0]);
  const std::string name = number < kKnown && kOthers[number][0] != '\0'
                               ? std::string(kOthers[number])
                               : absl::StrCat("number ", number);
  return absl::UnimplementedError(absl::StrCat(
      "GGUF type ", name,
      " is not supported; convert the model to F16, Q4_0, Q4_1 or Q8_0 (llama-quantize)"));
}

std::optional<DType> FloatDType(const SourceDType& dtype) {
  if (dtype.name == "F32") return DType::kF32;
  if (dtype.name == "F16") return DType::kF16;
  if (dtype.name == "BF16") return DType::kBF16;
  return std::nullopt;
}

absl::StatusOr<uint64_t> TensorBytes(const SourceDType& dtype, const Shape& shape,
                                     const std::string& what) {
  const uint64_t last = shape.empty() ? 1 : shape.back();
  if (last % dtype.block_elements != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        what, ": shape ", ShapeText(shape), ": ", last, " columns are no multiple of the ",
        dtype.block_elements, " of a ", dtype.name, " block; download or save the file again"));
  }
  uint64_t bytes = dtype.block_bytes;
  bool overflow = false;
  for (size_t i = 0; i < shape.size(); ++i) {
    const uint64_t factor = i + 1 < shape.size() ? shape[i] : shape[i] / dtype.block_elements;
    overflow |= __builtin_mul_overflow(bytes, factor, &bytes);
  }
  if (overflow || bytes > static_cast<uint64_t>(INT64_MAX)) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": shape ", ShapeText(shape),
                     " has too many elements; download or save the file again"));
  }
  return bytes;
}

std::string ShapeText(const Shape& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

}  // namespace sluice::checkpoint
