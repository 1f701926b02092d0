// HexHash: a fixed 128-bit fingerprint of a text, as 32 hex digits, for the model's digest. It
// tells changed content apart; it does not withstand somebody who wants two models with one digest.
#pragma once

#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"

namespace sluice::checkpoint {

// FNV-1a, 64 bits, from two starting values.
inline std::string HexHash(const std::string& text) {
  constexpr uint64_t kPrime = 0x100000001B3;
  uint64_t first = 0xCBF29CE484222325, second = 0x9AE16A3B2F90404F;
  for (const char c : text) {
    first = (first ^ static_cast<uint8_t>(c)) * kPrime;
    second = (second ^ static_cast<uint8_t>(c)) * kPrime + (first >> 32);
  }
  return absl::StrCat(absl::Hex(first, absl::kZeroPad16), absl::Hex(second, absl::kZeroPad16));
}

}  // namespace sluice::checkpoint
