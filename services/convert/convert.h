// Conversion of a checkpoint into a Hugging Face folder that transformers reads: unquantized, or
// quantized to 4 bits by rounding to nearest (no calibration).
//
// Works tensor by tensor: it holds the output of one linear (half a byte a weight) and a slab of its
// input; a quantized source is read a tensor at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/checkpoint/checkpoint.h"

namespace sluice::convert {

enum class Format : uint8_t { kFloat16, kBFloat16, kFloat32, kGptq, kAwq, kNf4, kFp4 };

// "fp16", "bf16", "fp32", "gptq", "awq", "nf4", "fp4".
const char* NameOf(Format format);

struct ConvertOptions {
  Format format = Format::kFloat16;
  // GPTQ and AWQ: columns that share a scale, a multiple of 8; -1: a whole row.
  int64_t group_size = 128;
  // GPTQ: zero point 8 and format v1; else a zero point a group and format v2. AWQ always has zeros.
  bool symmetric = true;
  // NF4 and FP4: the scales are quantized to 8 bits.
  bool double_quant = false;
  // Weights go into one file, or into several of at most this size with an index.
  uint64_t max_shard_bytes = 5'000'000'000;
};

struct ConvertResult {
  uint64_t weight_bytes = 0;
  size_t tensors = 0;              // In the files
  size_t quantized = 0;            // Linears
  size_t files = 0;                // Of weights
  std::vector<std::string> notes;  // What a person should know about this result
};

// Called after each piece of work. False stops the conversion: CANCELLED.
using ConvertProgress = std::function<bool(uint64_t done_weights, uint64_t total_weights)>;

// Writes the folder `output`, which must not exist: first under another name beside it, read back by
// Checkpoint::Open, then renamed in one step; nothing is left behind after an error.
// ALREADY_EXISTS: `output` is there. INVALID_ARGUMENT, naming the tensor, the rule and the way out: a
// group size that does not divide, a weight that does not fit. RESOURCE_EXHAUSTED: the disk is full.
absl::StatusOr<ConvertResult> Convert(const checkpoint::Checkpoint& source,
                                      const ConvertOptions& options, const std::string& output,
                                      const ConvertProgress& progress);

}  // namespace sluice::convert
