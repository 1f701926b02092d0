// NF4 and FP4 as bitsandbytes quantizes and stores them, byte for byte; the layout is described in
// services/checkpoint/format_bnb.cc, which reads it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/convert/int4.h"
#include "services/convert/weight_rows.h"

namespace sluice::convert {

inline constexpr uint64_t kBnbBlock = 64;         // Weights, flattened by row, that share a scale
inline constexpr uint64_t kBnbNestedBlock = 256;  // Scales that share an outer scale

// The code table; "nf4" or "fp4".
const float* BnbTable(const std::string& type);

// The 256 values, ascending, in which nested scales are stored: signed, 7 bits of exponent.
const std::vector<float>& BnbDynamicMap();

// The JSON text beside the weight. Its length does not depend on the offset, which is not negative.
std::string BnbState(const std::string& type, int64_t n, int64_t k, bool nested, double offset);

// The parts of BnbParts() in their order: weight, absmax, quant_map, quant_state and, nested,
// nested_absmax, nested_quant_map. From the weights as float16.
absl::StatusOr<std::vector<Bytes>> QuantizeBnb(const WeightRows& rows, const std::string& type,
                                               bool nested);

}  // namespace sluice::convert
