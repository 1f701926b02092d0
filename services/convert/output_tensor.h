// What a conversion writes, known before a weight is read: which tensors, of which type and shape.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/source_dtype.h"
#include "services/convert/convert.h"

namespace sluice::convert {

// One tensor of a safetensors file.
struct OutputTensor {
  std::string name;
  std::string dtype;  // By its safetensors name
  checkpoint::Shape shape;
  uint64_t bytes = 0;
};

// How one tensor of the source is written. `parts` in the order in which the encoder makes them.
struct PlannedTensor {
  enum class Encoding : uint8_t { kPlain, kGptq, kAwq, kBnb };

  int index = 0;  // In the source's description
  Encoding encoding = Encoding::kPlain;
  int64_t n = 1;  // Rows; 1 for a vector
  int64_t k = 1;
  int64_t group_size = 0;  // kGptq and kAwq
  std::vector<OutputTensor> parts;
};

// Parts of a linear [n, k]; `base` is its name without ".weight".
std::vector<OutputTensor> GptqParts(const std::string& base, int64_t n, int64_t k,
                                    int64_t group_size);
std::vector<OutputTensor> AwqParts(const std::string& base, int64_t n, int64_t k,
                                   int64_t group_size);
std::vector<OutputTensor> BnbParts(const std::string& base, int64_t n, int64_t k,
                                   const ConvertOptions& options);

// Every tensor of the folder, in the source's order. INVALID_ARGUMENT when a linear cannot have the
// format: names it and says which group sizes it could have.
absl::StatusOr<std::vector<PlannedTensor>> PlanTensors(const checkpoint::Checkpoint& source,
                                                       const ConvertOptions& options);

}  // namespace sluice::convert
