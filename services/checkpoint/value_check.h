// ValueCheck: reads every tensor of a checkpoint and says what headers cannot: values that are not
// finite, zero points that contradict the configuration. For `sluice inspect`; serving checks each
// tensor on its way.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "services/checkpoint/checkpoint.h"

namespace sluice::checkpoint {

struct ValueReport {
  std::vector<std::string> errors;  // The model cannot be served; at most 20, each names its tensor
  std::vector<std::string> warnings;  // It can, but something is odd
  uint64_t more_errors = 0;           // Those left out of `errors`
};

// Holds one quantized tensor, or 16 MiB of a plain one, at a time. `on_tensor` is told the number of
// tensors that are done; false from it ends the check.
ValueReport CheckAllValues(const Checkpoint& checkpoint, const std::function<bool(int)>& on_tensor);

}  // namespace sluice::checkpoint
