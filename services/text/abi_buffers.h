// Buffers and codes of text_abi.h as C++ values. Used by this folder's .cc files only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "services/text/text_abi.h"
#include "services/text/tokenizer.h"

namespace sluice::text {

inline SluiceTextSlice Borrow(const std::string& s) {
  return {reinterpret_cast<const uint8_t*>(s.data()), s.size()};
}

// Copies and frees.
inline std::string Take(SluiceTextBytes bytes) {
  std::string out;
  if (bytes.size > 0) out.assign(reinterpret_cast<const char*>(bytes.data), bytes.size);
  sluice_text_free_bytes(bytes);
  return out;
}

// Copies and frees.
inline std::vector<uint32_t> Take(SluiceTextIds ids) {
  std::vector<uint32_t> out;
  if (ids.size > 0) out.assign(ids.data, ids.data + ids.size);
  sluice_text_free_ids(ids);
  return out;
}

// The status of a call that returned `code` and filled `error`; frees `error`.
inline absl::Status TakeStatus(int32_t code, SluiceTextBytes error) {
  const std::string message = Take(error);
  if (code == 0) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(code), message);
}

}  // namespace sluice::text
