#include "worker/engine/assignment_check.h"

#include <cmath>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"

namespace sluice::worker {
namespace {

using internal::v1::ModelConfig;
using internal::v1::ShardAssignment;

struct Range {
  const char* field;
  uint64_t value;
  uint64_t low;
  uint64_t high;
};

absl::Status CheckRange(const Range& range) {
  if (range.value >= range.low && range.value <= range.high) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(range.field, " = ", range.value,
                                                 " is out of range ", range.low, "..", range.high));
}

absl::Status CheckDimensions(const ModelConfig& config) {
  const Range ranges[] = {
      {"config.num_layers", config.num_layers(), 1, 1000},
      {"config.hidden_size", config.hidden_size(), 1, 1 << 20},
      {"config.intermediate_size", config.intermediate_size(), 1, 1 << 22},
      {"config.num_heads", config.num_heads(), 1, 1 << 14},
      {"config.num_kv_heads", config.num_kv_heads(), 1, config.num_heads()},
      {"config.head_dim", config.head_dim(), 1, 1 << 14},
      {"config.vocab_size", config.vocab_size(), 1, 1 << 24},
      {"config.max_position_embeddings", config.max_position_embeddings(), 1, 1 << 28},
  };
  for (const Range& range : ranges) SLUICE_RETURN_IF_ERROR(CheckRange(range));
  if (config.num_heads() % config.num_kv_heads() != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("config.num_kv_heads = ", config.num_kv_heads(),
                     " must divide config.num_heads = ", config.num_heads()));
  }
  if (!std::isfinite(config.norm_eps()) || config.norm_eps() < 0) {
    return absl::InvalidArgumentError("config.norm_eps must be finite and not negative");
  }
  return absl::OkStatus();
}

absl::Status CheckArchitecture(const ShardAssignment& assignment) {
  const ModelConfig& config = assignment.config();
  if (config.activation() < internal::v1::MLP_ACTIVATION_RELU ||
      config.activation() > internal::v1::MLP_ACTIVATION_GELU_TANH) {
    return absl::InvalidArgumentError(
        absl::StrCat("config.activation = ", config.activation(), " is not one this engine knows"));
  }
  switch (config.architecture()) {
    case internal::v1::ARCHITECTURE_LLAMA:
      if (config.head_dim() % 2 != 0) {
        return absl::InvalidArgumentError(
            absl::StrCat("config.head_dim = ", config.head_dim(),
                         " must be even: the rotary embedding turns pairs"));
      }
      return absl::OkStatus();
    case internal::v1::ARCHITECTURE_OPT:
      SLUICE_RETURN_IF_ERROR(
          CheckRange({"config.word_embed_dim", config.word_embed_dim(), 1, 1 << 20}));
      // The table of learned positions ends there.
      return CheckRange(
          {"max_model_len", assignment.max_model_len(), 1, config.max_position_embeddings()});
    default:
      return absl::InvalidArgumentError(absl::StrCat(
          "config.architecture = ", config.architecture(), " is not one this engine knows"));
  }
}

absl::Status CheckStage(const ShardAssignment& assignment) {
  const uint32_t begin = assignment.layers().begin();
  const uint32_t end = assignment.layers().end();
  const uint32_t num_layers = assignment.config().num_layers();
  if (begin >= end || end > num_layers) {
    return absl::InvalidArgumentError(absl::StrCat("layers [", begin, ", ", end,
                                                   ") must be a range within [0, ", num_layers,
                                                   ") with one layer at least"));
  }
  SLUICE_RETURN_IF_ERROR(CheckRange({"stages", assignment.stages(), 1, num_layers}));
  SLUICE_RETURN_IF_ERROR(CheckRange({"stage", assignment.stage(), 0, assignment.stages() - 1}));
  const bool first = assignment.stage() == 0;
  const bool last = assignment.stage() == assignment.stages() - 1;
  if (assignment.has_embedding() != first || (begin == 0) != first) {
    return absl::InvalidArgumentError(
        "has_embedding must be set, and layers begin at 0, on stage 0 and there only");
  }
  if (assignment.has_head() != last || (end == num_layers) != last) {
    return absl::InvalidArgumentError(
        "has_head must be set, and layers end at num_layers, on the last stage and there only");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckAssignment(const ShardAssignment& assignment) {
  SLUICE_RETURN_IF_ERROR(CheckDimensions(assignment.config()));
  const Range ranges[] = {
      {"block_size", assignment.block_size(), 1, 1 << 12},
      {"num_blocks", assignment.num_blocks(), 1, 1u << 30},
      {"max_batch_tokens", assignment.max_batch_tokens(), 1, 1 << 20},
      {"max_batch_size", assignment.max_batch_size(), 1, assignment.max_batch_tokens()},
      {"max_model_len", assignment.max_model_len(), 1, 1 << 28},
  };
  for (const Range& range : ranges) SLUICE_RETURN_IF_ERROR(CheckRange(range));
  SLUICE_RETURN_IF_ERROR(CheckStage(assignment));
  return CheckArchitecture(assignment);
}

}  // namespace sluice::worker
