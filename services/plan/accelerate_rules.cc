#include "services/plan/accelerate_rules.h"

#include <algorithm>
#include <deque>
#include <limits>
#include <map>
#include <optional>

#include "absl/strings/match.h"

namespace sluice::plan {
namespace {

// A module or (module == nullptr) a tensor still to be placed, by full name.
struct Item {
  std::string name;
  const Module* module = nullptr;
};

// "a.b" is inside "a" and inside itself. Accelerate looks for a substring, not for a prefix; so do
// we.
bool Contains(const std::string& module, const std::string& tensor) {
  return (tensor + ".").find(module + ".") != std::string::npos;
}

// Direct parameters, then children: what a split puts in a module's place (buffers are lost, as in
// the libraries).
std::vector<Item> PartsOf(const Item& item) {
  std::vector<Item> parts;
  for (const TreeTensor& tensor : item.module->parameters) {
    parts.push_back({JoinName(item.name, tensor.name), nullptr});
  }
  for (const Module& child : item.module->children) {
    parts.push_back({JoinName(item.name, child.name), &child});
  }
  return parts;
}

class Inference {
 public:
  Inference(const Module& root, const Budgets& max_memory, const RuleOptions& options)
      : options_(options), sizes_(root), ties_(TiedGroups(root)), devices_(max_memory) {
    const bool has_disk = std::any_of(devices_.begin(), devices_.end(),
                                      [](const auto& entry) { return entry.first == "disk"; });
    if (!has_disk) {
      devices_.emplace_back("disk", 0.0);
    }
    devices_.back().second = std::numeric_limits<double>::infinity();
    const Item whole{"", &root};
    for (const Item& part : PartsOf(whole)) {
      work_.push_back(part);
    }
    for (const TreeTensor& buffer : root.buffers) {
      work_.push_back({buffer.name, nullptr});
    }
    FindLargestLayers(/*modules_only=*/false);
  }

  std::vector<std::pair<std::string, Device>> Run() {
    while (!work_.empty()) {
      PlaceNext();
    }
    return placed_;
  }

 private:
  // What must go with a module because storage is shared.
  struct Partners {
    std::vector<std::string> tensors;
    std::vector<Item> modules;
    double size_together = 0;
  };

  bool Splittable(const Item& item) const {
    return item.module != nullptr && !item.module->children.empty() &&
           options_.no_split_classes.count(item.module->class_name) == 0;
  }

  double SizeOf(const std::string& name) const { return static_cast<double>(sizes_.at(name)); }

  // R: size of the largest layer still to be placed, and the names of all layers of that size.
  void FindLargestLayers(bool modules_only) {
    largest_ = 0;
    largest_names_.clear();
    std::deque<Item> queue;
    for (const Item& item : work_) {
      if (!modules_only || item.module != nullptr) {
        queue.push_back(item);
      }
    }
    while (!queue.empty()) {
      const Item item = queue.front();
      queue.pop_front();
      if (Splittable(item)) {
        std::vector<Item> children = PartsOf(item);
        children.erase(children.begin(), children.begin() + item.module->parameters.size());
        queue.insert(queue.begin(), children.begin(), children.end());
        continue;
      }
      const double size = SizeOf(item.name);
      if (size > largest_) {
        largest_ = size;
        largest_names_.clear();
      }
      if (size == largest_) {
        largest_names_.push_back(item.name);
      }
    }
  }

  void ForgetLargest(const std::string& name) {
    largest_names_.erase(std::remove_if(largest_names_.begin(), largest_names_.end(),
                                        [&](const std::string& layer) {
                                          return layer == name ||
                                                 absl::StartsWith(layer, name + ".");
                                        }),
                         largest_names_.end());
    if (largest_names_.empty()) {
      FindLargestLayers(/*modules_only=*/true);
    }
  }

  Partners PartnersOf(const std::string& name, const std::vector<Item>& among) const {
    Partners partners;
    partners.size_together = SizeOf(name);
    for (const auto& group : ties_) {
      std::vector<std::string> outside;
      for (const std::string& tensor : group) {
        if (!Contains(name, tensor)) {
          outside.push_back(tensor);
        }
      }
      if (!outside.empty() && outside.size() < group.size()) {
        partners.tensors.insert(partners.tensors.end(), outside.begin(), outside.end());
      }
    }
    for (const std::string& tensor : partners.tensors) {
      auto it = std::find_if(among.begin(), among.end(), [&](const Item& item) {
        return item.name == tensor || absl::StartsWith(tensor, item.name + ".");
      });
      if (it == among.end()) {
        continue;  // The library fails here; a partner that is placed already costs nothing
      }
      const bool known = std::any_of(partners.modules.begin(), partners.modules.end(),
                                     [&](const Item& item) { return item.name == it->name; });
      if (options_.rules == HfRules::kAccelerate) {
        partners.size_together += SizeOf(it->name) - SizeOf(tensor);
      } else if (!known) {
        partners.size_together += SizeOf(it->name);
      }
      if (!known) {
        partners.modules.push_back(*it);
      }
    }
    return partners;
  }

  bool IsMain(size_t device) const {
    if (devices_[device].first == "cpu") {
      return true;
    }
    return device == 0 && IsNumbered(devices_[0].first);
  }

  void PlaceNext() {
    const Item item = work_.front();
    work_.erase(work_.begin());
    ForgetLargest(item.name);
    const double size = SizeOf(item.name);
    const Partners partners = PartnersOf(item.name, work_);
    const double reserved = IsMain(current_) ? largest_ : 0.0;
    const double limit = devices_[current_].second - reserved;
    if (used_ + partners.size_together <= limit) {
      Place(item, partners);
      return;
    }
    if (!partners.tensors.empty() && used_ + size <= limit && SplitPartner(item, partners)) {
      return;
    }
    const bool too_big = used_ + size >= limit || options_.rules == HfRules::kTransformers;
    if (too_big && Splittable(item)) {
      const std::vector<Item> parts = PartsOf(item);
      work_.insert(work_.begin(), parts.begin(), parts.end());
      FindLargestLayers(/*modules_only=*/true);
      return;
    }
    if (used_ == 0 && options_.fallback_allocation && Fallback(item, partners.size_together)) {
      return;
    }
    ++current_;  // What was reserved stays charged on the device that is left: nothing comes back
                 // to it
    used_ = 0;
    work_.insert(work_.begin(), item);
  }

  void Place(const Item& item, const Partners& partners) {
    const Device& device = devices_[current_].first;
    used_ += partners.size_together;
    placed_.emplace_back(item.name, device);
    for (const Item& partner : partners.modules) {
      work_.erase(std::remove_if(work_.begin(), work_.end(),
                                 [&](const Item& other) { return other.name == partner.name; }),
                  work_.end());
      placed_.emplace_back(partner.name, device);
    }
  }

  bool SplitPartner(const Item& item, const Partners& partners) {
    for (const Item& partner : partners.modules) {
      if (!Splittable(partner)) {
        continue;
      }
      auto it = std::find_if(work_.begin(), work_.end(),
                             [&](const Item& other) { return other.name == partner.name; });
      const std::vector<Item> parts = PartsOf(partner);
      it = work_.erase(it);
      work_.insert(it, parts.begin(), parts.end());
      work_.insert(work_.begin(), item);
      FindLargestLayers(/*modules_only=*/true);
      return true;
    }
    return false;
  }

  // Any later module that fits the empty device, found breadth-first from the head of the list.
  bool Fallback(const Item& item, double size_together) {
    const double room = devices_[current_].second - std::max(largest_, size_together);
    std::vector<Item> search = work_;
    std::optional<Item> found;
    while (!search.empty() && !found.has_value()) {
      const Item candidate = search.front();
      search.erase(search.begin());
      if (PartnersOf(candidate.name, search).size_together <= room) {
        found = candidate;
      } else if (Splittable(candidate)) {
        const std::vector<Item> parts = PartsOf(candidate);
        search.insert(search.begin(), parts.begin(), parts.end());
      }
    }
    if (!found.has_value()) {
      return false;
    }
    ExposeInWork(found->name);
    work_.erase(std::find_if(work_.begin(), work_.end(),
                             [&](const Item& other) { return other.name == found->name; }));
    work_.insert(work_.begin(), {*found, item});
    return true;
  }

  // Splits the ancestors of `name` that are in the list until `name` itself is in it.
  void ExposeInWork(const std::string& name) {
    for (size_t dot = name.find('.'); dot != std::string::npos; dot = name.find('.', dot + 1)) {
      auto it = std::find_if(work_.begin(), work_.end(),
                             [&](const Item& other) { return other.name == name.substr(0, dot); });
      if (it != work_.end()) {
        const std::vector<Item> parts = PartsOf(*it);
        it = work_.erase(it);
        work_.insert(it, parts.begin(), parts.end());
      }
    }
  }

  const RuleOptions& options_;
  const ModuleSizes sizes_;
  const std::vector<std::vector<std::string>> ties_;
  Budgets devices_;
  std::vector<Item> work_;
  std::vector<std::pair<std::string, Device>> placed_;
  size_t current_ = 0;  // Device that is being filled; only moves forward
  double used_ = 0;     // Bytes on it
  double largest_ = 0;  // R
  std::vector<std::string> largest_names_;
};

void Collapse(std::map<std::string, Device>& map, const std::string& name) {
  const std::string prefix = name.empty() ? "" : name + ".";
  std::vector<std::string> inside;
  for (const auto& [key, device] : map) {
    if (absl::StartsWith(key, prefix)) {
      inside.push_back(key);
    }
  }
  const bool one_device =
      inside.size() > 1 && std::all_of(inside.begin(), inside.end(), [&](const std::string& key) {
        return map[key] == map[inside[0]];
      });
  if (one_device) {
    const Device device = map[inside[0]];
    for (const std::string& key : inside) {
      map.erase(key);
    }
    map[name] = device;
    return;
  }
  std::set<std::string> children;
  for (const std::string& key : inside) {
    if (key.size() > prefix.size()) {
      children.insert(key.substr(0, key.find('.', prefix.size())));
    }
  }
  for (const std::string& child : children) {
    Collapse(map, child);
  }
}

}  // namespace

std::vector<std::pair<std::string, Device>> InferDeviceMap(const Module& root,
                                                           const Budgets& max_memory,
                                                           const RuleOptions& options) {
  return CollapseMap(root, Inference(root, max_memory, options).Run());
}

std::vector<std::pair<std::string, Device>> CollapseMap(
    const Module& root, const std::vector<std::pair<std::string, Device>>& map) {
  std::map<std::string, Device> by_name(map.begin(), map.end());
  Collapse(by_name, "");
  const std::unordered_map<std::string, int> order = DefinitionOrder(root);
  std::vector<std::pair<std::string, Device>> result(by_name.begin(), by_name.end());
  auto place = [&](const std::string& name) {
    auto it = order.find(name);
    return it == order.end() ? std::numeric_limits<int>::max() : it->second;
  };
  std::stable_sort(result.begin(), result.end(),
                   [&](const auto& a, const auto& b) { return place(a.first) < place(b.first); });
  return result;
}

}  // namespace sluice::plan
