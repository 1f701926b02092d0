// Checkpoints that real libraries wrote (tests/testdata/README.md), with what transformers computed
// from them, and how the engine runs them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "services/checkpoint/checkpoint.h"

namespace sluice::worker {

struct Golden {
  std::vector<uint32_t> prompt_ids;
  std::vector<uint32_t> greedy_ids;
  std::vector<float> gaps;  // Best logit less the second best, where each greedy id was chosen
  std::vector<uint32_t> positions;  // Whose logits are stored
  std::vector<float> logits;        // [positions, vocab_size]
  uint32_t max_model_len = 128;     // Of the assignment that runs it
};

std::filesystem::path CheckpointFolder();
// Those that have a golden, sorted.
std::vector<std::string> CheckpointNames();
Golden ReadGolden(const std::filesystem::path& folder);

// What a quantized weight is turned into before it is loaded.
enum class WeightForm { kAsStored, kFloat32, kFloat16 };

struct Outcome {
  std::vector<std::vector<float>>
      logits;                     // By position: the prompt, then the golden's own greedy ids
  std::vector<uint32_t> sampled;  // What greedy sampling chose after each of them
};

// Prefill in chunks of `chunk` tokens and decode of the golden's greedy ids, over `stages` stages.
// The weights go through the engine's own loader. make_backend: of a stage; null: the CPU's.
Outcome RunGolden(const checkpoint::Checkpoint& source, const Golden& golden, uint32_t stages,
                  uint32_t chunk, WeightForm form = WeightForm::kAsStored,
                  const std::function<std::unique_ptr<Backend>(size_t)>& make_backend = nullptr);

}  // namespace sluice::worker
