// 4-bit quantization by groups, rounding to nearest, and the two layouts in which it is stored. The
// layouts are described in services/checkpoint/format_gptq.cc and format_awq.cc, which read them.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/quant.h"
#include "services/convert/weight_rows.h"

namespace sluice::convert {

// Scale and zero of one group of `count` weights, and their codes: w is near scale * (code - zero).
//
// Symmetric: zero 8, scale = 2 max|w| / 15. Else: the least range that holds 0 and all weights in 15
// steps, zero = round(-min / scale). The scale is rounded to float16 before the codes are chosen, so
// |w - scale * (code - zero)| <= scale * (1/2 + 15 * 2^-11), for every weight, also at both ends
// (scales below 2^-14, which have fewer digits: within 15 * 2^-25 more).
struct Int4Group {
  uint16_t scale = 0;  // float16
  uint8_t zero = 8;
};
Int4Group QuantizeGroup(const float* weights, int64_t count, bool symmetric, uint8_t* codes);

// The whole tensor, from its weights as float16. REQUIRES: group_size divides k, which is even.
absl::StatusOr<QuantizedMatrix> QuantizeInt4(const WeightRows& rows, int64_t group_size,
                                             bool symmetric);

using Bytes = std::vector<uint8_t>;

// qweight, scales, qzeros, g_idx. `zeros_minus_one`: format v1, else v2. REQUIRES: kInt4Zero with
// float16 scales, no permutation, n and k multiples of 8, zeros below 16 (v1: above 0 as well).
std::vector<Bytes> PackGptq(const QuantizedMatrix& matrix, bool zeros_minus_one);
// qweight, scales, qzeros of the GEMM layout. REQUIRES: as above.
std::vector<Bytes> PackAwq(const QuantizedMatrix& matrix);

}  // namespace sluice::convert
