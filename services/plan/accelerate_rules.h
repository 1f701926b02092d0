// The placement rules of Hugging Face accelerate and of transformers' own copy of them, to the
// byte: which module of a tree goes to which device. Pure functions over a generic tree; the golden
// cases of tests/services/plan run on stubs.
#pragma once

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "services/plan/memory.h"
#include "services/plan/module_tree.h"

namespace sluice::plan {

// The two differ in three places: the surplus that balancing adds to a device's share
// (accelerate: 1.25 x the larger of a layer and the mean leaf; transformers 5: 1.25 x the larger of
// the largest layer and the largest leaf), how the size of a tied partner is counted, and whether a
// module that would fit without its partner may be split.
using HfRules = PlanOptions::HfRules;

struct RuleOptions {
  HfRules rules = HfRules::kAccelerate;
  std::set<std::string> no_split_classes;
  bool fallback_allocation =
      false;  // Accelerate's flag: give an empty device any later module that fits
};

// get_balanced_memory: budgets that spread the model over the numbered devices; "cpu" and "disk"
// keep theirs. `low_zero` is balanced_low_0. INVALID_ARGUMENT where the library fails:
// balanced_low_0 over numbers other than 0..n-1.
absl::StatusOr<Budgets> BalancedMemory(const Module& root, const Budgets& max_memory,
                                       const RuleOptions& options, bool low_zero);

// infer_auto_device_map with clean_result: names and devices in definition order. "disk" takes what
// fits nowhere else.
std::vector<std::pair<std::string, Device>> InferDeviceMap(const Module& root,
                                                           const Budgets& max_memory,
                                                           const RuleOptions& options);

// clean_device_map: children that are all on one device become their parent; {"": d} when
// everything is on d. `map` in any order; the result is in definition order.
std::vector<std::pair<std::string, Device>> CollapseMap(
    const Module& root, const std::vector<std::pair<std::string, Device>>& map);

}  // namespace sluice::plan
