// HexHash: a fixed 128-bit fingerprint of a text, as 32 hex digits, for the model's digest. It
// tells changed content apart; it does not withstand somebody who wants two models with one digest.
#pragma once

#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"

namespace sluice::checkpoint {

// FNV-1a, 64 bits, from two starting values; of a text that comes in pieces.
class Hasher {
 public:
  void Add(const std::string& piece) {
    constexpr uint64_t kPrime = 0x100000001B3;
    for (const char c : piece) {
      first_ = (first_ ^ static_cast<uint8_t>(c)) * kPrime;
      second_ = (second_ ^ static_cast<uint8_t>(c)) * kPrime + (first_ >> 32);
    }
  }
  std::string Hex() const {
    return absl::StrCat(absl::Hex(first_, absl::kZeroPad16), absl::Hex(second_, absl::kZeroPad16));
  }

 private:
  uint64_t first_ = 0xCBF29CE484222325, second_ = 0x9AE16A3B2F90404F;
};

inline std::string HexHash(const std::string& text) {
  Hasher hasher;
  hasher.Add(text);
  return hasher.Hex();
}

}  // namespace sluice::checkpoint
