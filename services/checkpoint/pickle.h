// A reader of pickles as torch.save writes them, which executes nothing: a pickle becomes a graph
// of plain values, and a call in it becomes a value that says what would have been called. Opcodes
// and names that a state dict does not need are errors, and there is no other way to read it.
//
// Caps: 8 MB of pickle, 300,000 values, 1,000,000 references, 100,000 values on the stack, 64
// levels of marks and of nesting, strings of 4 KB. Working memory stays below 64 MiB.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace sluice::checkpoint {

inline constexpr uint64_t kMaxPickleBytes = 8'000'000;

struct PickleValue {
  enum class Kind : uint8_t {
    kNone,
    kBool,     // number
    kInt,      // number
    kFloat,    // Its value is not kept.
    kString,   // text
    kTuple,    // items
    kList,     // items
    kDict,     // items: key, value, key, value, ...
    kGlobal,   // text: "module name"
    kStorage,  // items: what the persistent id holds
    kCall      // text: "module name" of the callee; items: arguments
  };
  Kind kind = Kind::kNone;
  uint8_t depth = 0;  // Levels below it.
  int64_t number = 0;
  std::string text;
  std::vector<uint32_t> items;  // Indices into PickleGraph::values.
};

// Containers may refer to each other in cycles: do not walk it without a limit.
struct PickleGraph {
  std::deque<PickleValue> values;
  uint32_t root = 0;
  const PickleValue& operator[](uint32_t index) const { return values[index]; }
};

// `what` starts each error: INVALID_ARGUMENT with the position, the rule and the way out.
absl::StatusOr<PickleGraph> ReadPickle(const std::string& bytes, const std::string& what);

}  // namespace sluice::checkpoint
