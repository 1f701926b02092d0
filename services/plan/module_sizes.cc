#include <algorithm>
#include <map>

#include "services/plan/module_tree.h"

namespace sluice::plan {
namespace {

void CollectTies(const Module& module, const std::string& name,
                 std::map<std::string, std::vector<std::string>>& groups) {
  for (const TreeTensor& tensor : module.parameters) {
    if (!tensor.tied_to.empty()) {
      groups[tensor.tied_to].push_back(JoinName(name, tensor.name));
    }
  }
  for (const Module& child : module.children) {
    CollectTies(child, JoinName(name, child.name), groups);
  }
}

void CollectParameters(const Module& module, const std::string& name,
                       std::vector<std::string>& out) {
  for (const TreeTensor& tensor : module.parameters) {
    out.push_back(JoinName(name, tensor.name));
  }
  for (const Module& child : module.children) {
    CollectParameters(child, JoinName(name, child.name), out);
  }
}

void CollectOrder(const Module& module, const std::string& name,
                  std::unordered_map<std::string, int>& order) {
  order.emplace(name, static_cast<int>(order.size()));
  for (const TreeTensor& tensor : module.parameters) {
    order.emplace(JoinName(name, tensor.name), static_cast<int>(order.size()));
  }
  for (const Module& child : module.children) {
    CollectOrder(child, JoinName(name, child.name), order);
  }
  for (const TreeTensor& tensor : module.buffers) {
    order.emplace(JoinName(name, tensor.name), static_cast<int>(order.size()));
  }
}

}  // namespace

std::string JoinName(const std::string& parent, const std::string& child) {
  return parent.empty() ? child : parent + "." + child;
}

ModuleSizes::ModuleSizes(const Module& root) {
  Walk(root, "", /*buffers=*/false);
  Walk(root, "", /*buffers=*/true);
}

void ModuleSizes::Walk(const Module& module, const std::string& name, bool buffers) {
  for (const TreeTensor& tensor : buffers ? module.buffers : module.parameters) {
    if (tensor.tied_to.empty()) {
      Add(JoinName(name, tensor.name), tensor.bytes);
    }
  }
  for (const Module& child : module.children) {
    Walk(child, JoinName(name, child.name), buffers);
  }
}

void ModuleSizes::Add(const std::string& tensor, uint64_t bytes) {
  tensors_.insert(tensor);
  auto add_to = [&](const std::string& name) {
    auto [it, is_new] = index_.emplace(name, ordered_.size());
    if (is_new) {
      ordered_.emplace_back(name, 0);
    }
    ordered_[it->second].second += bytes;
  };
  add_to("");
  for (size_t dot = tensor.find('.'); dot != std::string::npos; dot = tensor.find('.', dot + 1)) {
    add_to(tensor.substr(0, dot));
  }
  add_to(tensor);
}

uint64_t ModuleSizes::at(const std::string& name) const {
  auto it = index_.find(name);
  return it == index_.end() ? 0 : ordered_[it->second].second;
}

std::vector<std::vector<std::string>> TiedGroups(const Module& root) {
  std::map<std::string, std::vector<std::string>> groups;
  CollectTies(root, "", groups);
  std::vector<std::vector<std::string>> result;
  for (auto& [owner, names] : groups) {
    names.push_back(owner);
    std::sort(names.begin(), names.end());
    result.push_back(names);
  }
  return result;
}

std::vector<std::string> ParameterNames(const Module& root) {
  std::vector<std::string> names;
  CollectParameters(root, "", names);
  return names;
}

std::unordered_map<std::string, int> DefinitionOrder(const Module& root) {
  std::unordered_map<std::string, int> order;
  CollectOrder(root, "", order);
  return order;
}

const Module* FindModule(const Module& root, const std::string& name) {
  const Module* module = &root;
  size_t begin = 0;
  while (begin < name.size()) {
    const size_t dot = std::min(name.find('.', begin), name.size());
    const std::string part = name.substr(begin, dot - begin);
    auto it = std::find_if(module->children.begin(), module->children.end(),
                           [&](const Module& child) { return child.name == part; });
    if (it == module->children.end()) {
      return nullptr;
    }
    module = &*it;
    begin = dot + 1;
  }
  return module;
}

}  // namespace sluice::plan
