// ModelCatalog: what the loader says about its model, and the model's tokenizer. The controller
// itself opens no checkpoint.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/sluice/internal/v1/weights.pb.h"
#include "services/text/tokenizer.h"

namespace sluice::controller {

// A model as the controller knows it. Immutable.
struct ServedModel {
  std::string name;  // [A-Za-z0-9._-]{1,64}
  internal::v1::PlanShardsResponse shards;
  std::shared_ptr<const text::Tokenizer> tokenizer;
  std::vector<uint32_t> eos_ids;  // Of config and tokenizer, sorted
  uint64_t weight_bytes = 0;      // Canonical
};

// Name for users from a directory or file name: "dir/SmolLM2.Q4_1.gguf" -> "SmolLM2.Q4_1".
std::string ModelNameOf(const std::string& source);

// Builds the model from what the loader sent. INVALID_ARGUMENT, NOT_FOUND: the tokenizer cannot be
// used.
absl::StatusOr<std::shared_ptr<const ServedModel>> MakeServedModel(
    internal::v1::PlanShardsResponse shards, const text::TokenizerFiles& files,
    const std::string& name);

class ModelCatalog {
 public:
  using OnModel = std::function<void(std::shared_ptr<const ServedModel>)>;
  using OnError = std::function<void(const absl::Status&)>;

  // `name`: empty = from the loader. Asks again and again until the loader answers with a model
  // that can be served, then calls `on_model` once; before that `on_error` for each new error. Both
  // on a thread of its own, which stops at destruction.
  ModelCatalog(const std::string& loader_address, const std::string& name, OnModel on_model,
               OnError on_error);
  ~ModelCatalog();

 private:
  void Run();
  absl::StatusOr<std::shared_ptr<const ServedModel>> Fetch();

  const std::string loader_address_;
  const std::string name_;
  const OnModel on_model_;
  const OnError on_error_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace sluice::controller
