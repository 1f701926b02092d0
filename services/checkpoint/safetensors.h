// Reading of one safetensors file.
//
//   8 bytes  header length h, little-endian
//   h bytes  JSON {"name": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]},
//                  "__metadata__": {...}}
//   rest     the data; offsets count from here, are contiguous and cover it exactly
//
// Caps: header 25 MB, what json.h allows (about 35,000 tensors), name 512 bytes. The header alone
// is read.
#pragma once

#include "absl/status/statusor.h"
#include "services/checkpoint/tensor_set.h"

namespace sluice::checkpoint {

// INVALID_ARGUMENT for a broken file, UNIMPLEMENTED for a dtype of less than a byte.
absl::StatusOr<TensorFile> ReadSafetensors(const File& file);

}  // namespace sluice::checkpoint
