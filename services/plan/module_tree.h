// The module tree of a model, as the classes of transformers define it: what accelerate's rules
// walk over. A value type without weights: names, classes and byte sizes only.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/sluice/internal/v1/weights.pb.h"

namespace sluice::plan {

// A parameter or buffer that a module owns directly.
struct TreeTensor {
  std::string name;  // Local, e.g. "weight"
  uint64_t bytes = 0;
  std::string tied_to;  // Full name of the parameter whose storage this one shares; empty for its
                        // own storage
};

// A module: local name, class, direct parameters, buffers and children, all in definition order.
// The root has name "".
struct Module {
  std::string name;
  std::string class_name;
  std::vector<TreeTensor> parameters;
  std::vector<TreeTensor> buffers;
  std::vector<Module> children;
};

// "a" + "b" = "a.b"; "" + "b" = "b".
std::string JoinName(const std::string& parent, const std::string& child);

// Module name -> bytes below it, and tensor name -> bytes. Tied tensors count once, at the first of
// their names; a name that owns nothing is not listed and counts 0.
class ModuleSizes {
 public:
  explicit ModuleSizes(const Module& root);

  uint64_t at(const std::string& name) const;
  uint64_t total() const { return at(""); }
  // In the order in which accelerate meets them: parameters first, then buffers, each after its
  // parents.
  const std::vector<std::pair<std::string, uint64_t>>& ordered() const { return ordered_; }
  // Names of tensors among ordered().
  const std::set<std::string>& tensors() const { return tensors_; }

 private:
  void Add(const std::string& tensor, uint64_t bytes);
  void Walk(const Module& module, const std::string& name, bool buffers);

  std::vector<std::pair<std::string, uint64_t>> ordered_;
  std::unordered_map<std::string, size_t> index_;
  std::set<std::string> tensors_;
};

// Groups of names that share storage, each sorted; only groups of two and more.
std::vector<std::vector<std::string>> TiedGroups(const Module& root);

// Every parameter of the state dict (no non-persistent buffers), in definition order.
std::vector<std::string> ParameterNames(const Module& root);

// Every module and tensor name -> its place in definition order.
std::unordered_map<std::string, int> DefinitionOrder(const Module& root);

// The module called `name`, or nullptr.
const Module* FindModule(const Module& root, const std::string& name);

// Tree of the model that the loader described, sized as transformers counts it: tensors as stored;
// for bitsandbytes the codes alone (half a byte per element); rotary buffers in float32.
// INVALID_ARGUMENT for an architecture without a tree.
absl::StatusOr<Module> BuildModuleTree(const internal::v1::PlanShardsResponse& model);

// Class of the decoder layer, never split: "LlamaDecoderLayer" or "OPTDecoderLayer".
std::string LayerClass(const internal::v1::ModelConfig& config);

// Name of the list of layers: "model.layers" or "model.decoder.layers".
std::string LayersName(const internal::v1::ModelConfig& config);

}  // namespace sluice::plan
