// The tiny Llama of the tests, with its down projection quantized in each way. A shape smaller than
// any real one keeps the inputs short.
#pragma once

#include <cstdint>

#include "tests/services/checkpoint/checkpoint_builder.h"

namespace sluice::fuzz {

// 0 none, 1 GPTQ, 2 GPTQ with act-order, 3 AWQ, 4 NF4, 5 NF4 nested.
inline constexpr uint8_t kNumKinds = 6;
checkpoint::TinyModel ModelOfKind(uint8_t kind);

}  // namespace sluice::fuzz
