#include <algorithm>
#include <cmath>
#include <map>
#include <unordered_map>

#include "absl/strings/str_cat.h"
#include "services/plan/accelerate_rules.h"

namespace sluice::plan {
namespace {

void CollectClasses(const Module& module, const std::string& name,
                    std::unordered_map<std::string, std::string>& classes) {
  classes.emplace(name, module.class_name);
  for (const Module& child : module.children) {
    CollectClasses(child, JoinName(name, child.name), classes);
  }
}

// Names without children among `names`, as accelerate finds them: by counting dots.
std::vector<std::string> LeavesOf(const std::vector<std::string>& names) {
  std::unordered_map<std::string, int> children;
  for (const std::string& name : names) {
    const size_t dot = name.rfind('.');
    if (dot != std::string::npos) {
      ++children[name.substr(0, dot)];
    }
  }
  std::vector<std::string> leaves;
  for (const std::string& name : names) {
    if (!name.empty() && children.count(name) == 0) {
      leaves.push_back(name);
    }
  }
  return leaves;
}

// Accelerate: the first module of each no-split class, and the mean of the leaf modules.
double AccelerateSurplus(const Module& root, const ModuleSizes& sizes, const RuleOptions& options) {
  std::unordered_map<std::string, std::string> classes;
  CollectClasses(root, "", classes);
  std::map<std::string, uint64_t> first_of_class;
  std::vector<std::string> modules;
  for (const auto& [name, size] : sizes.ordered()) {
    auto it = classes.find(name);
    if (!name.empty() && it != classes.end() && options.no_split_classes.count(it->second) != 0) {
      first_of_class.emplace(it->second, size);
    }
    if (sizes.tensors().count(name) == 0) {
      modules.push_back(name);
    }
  }
  uint64_t largest = 0;
  for (const auto& [class_name, size] : first_of_class) {
    largest = std::max(largest, size);
  }
  uint64_t sum = 0;
  const std::vector<std::string> leaves = LeavesOf(modules);
  for (const std::string& leaf : leaves) {
    sum += sizes.at(leaf);
  }
  const double mean =
      static_cast<double>(sum) / static_cast<double>(std::max<size_t>(leaves.size(), 1));
  return std::max(static_cast<double>(largest), std::floor(mean));
}

// transformers 5: the largest module of any no-split class, and the largest module with tensors of
// its own.
double TransformersSurplus(const Module& root, const ModuleSizes& sizes,
                           const RuleOptions& options) {
  std::unordered_map<std::string, std::string> classes;
  CollectClasses(root, "", classes);
  uint64_t largest = 0;
  for (const auto& [name, class_name] : classes) {
    if (options.no_split_classes.count(class_name) != 0) {
      largest = std::max(largest, sizes.at(name));
    }
  }
  std::unordered_map<std::string, uint64_t> owned;
  for (const std::string& tensor : sizes.tensors()) {
    const size_t dot = tensor.rfind('.');
    if (dot != std::string::npos) {
      uint64_t& sum = owned[tensor.substr(0, dot)];
      sum += sizes.at(tensor);
      largest = std::max(largest, sum);
    }
  }
  return static_cast<double>(largest);
}

absl::Status LowerDeviceZero(const ModuleSizes& sizes, size_t num_devices, Budgets& budgets) {
  double others = 0;
  double* zero = nullptr;
  size_t found = 0;
  for (auto& [device, bytes] : budgets) {
    if (device == "0") {
      zero = &bytes;
    } else if (IsNumbered(device) && NumberOf(device) < static_cast<int>(num_devices)) {
      others += bytes;
      ++found;
    }
  }
  if (zero == nullptr || found + 1 != num_devices) {
    return absl::InvalidArgumentError(
        absl::StrCat("balanced_low_0 needs devices numbered 0 to ", num_devices - 1,
                     " without gaps, each with memory; number them so or use auto"));
  }
  *zero = std::min(std::max(0.0, static_cast<double>(sizes.total()) - others), *zero);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Budgets> BalancedMemory(const Module& root, const Budgets& max_memory,
                                       const RuleOptions& options, bool low_zero) {
  std::vector<size_t> numbered;
  for (size_t i = 0; i < max_memory.size(); ++i) {
    if (IsNumbered(max_memory[i].first) && max_memory[i].second > 0) {
      numbered.push_back(i);
    }
  }
  if (numbered.empty()) {
    return max_memory;
  }
  low_zero = low_zero && numbered.size() > 1;
  const ModuleSizes sizes(root);
  const uint64_t share = sizes.total() / (low_zero ? numbered.size() - 1 : numbered.size());
  const double surplus = options.rules == HfRules::kAccelerate
                             ? AccelerateSurplus(root, sizes, options)
                             : TransformersSurplus(root, sizes, options);
  const double per_device = static_cast<double>(share) + std::floor(1.25 * surplus);
  Budgets budgets = max_memory;
  // The last one keeps all it has, just in case the surplus is not enough.
  for (size_t i = 0; i + 1 < numbered.size(); ++i) {
    auto& [device, bytes] = budgets[numbered[i]];
    if (!low_zero || device != "0") {
      bytes = std::min(per_device, bytes);
    }
  }
  if (low_zero) {
    absl::Status status = LowerDeviceZero(sizes, numbered.size(), budgets);
    if (!status.ok()) {
      return status;
    }
  }
  return budgets;
}

}  // namespace sluice::plan
