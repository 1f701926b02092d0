// Device maps in Hugging Face accelerate's words and rules: which module of a model goes to which
// device. Pure functions of their arguments: no files, no clock, no devices.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/sluice/internal/v1/weights.pb.h"

namespace sluice::plan {

// "0", "1", ... are workers by device number; "cpu" a CPU worker beside GPU workers; "disk" exists
// in --hf-compat maps only.
using Device = std::string;

// max_memory: device -> bytes. Order: numbers ascending, then cpu, then disk.
using MaxMemory = std::map<Device, uint64_t>;

// Parses accelerate's notation: "0=10GiB,1=8GB,cpu=30GiB" (GiB/MiB/KiB = 2^n, GB/MB/KB = 10^n, case
// ignored, a final lower-case b means bits; a plain number is bytes). INVALID_ARGUMENT names the
// entry.
absl::StatusOr<MaxMemory> ParseMaxMemory(const std::string& text);
absl::StatusOr<uint64_t> ParseBytes(const std::string& text);

enum class MapMode { kSequential, kAuto, kBalancedLow0, kCustom };

// "sequential", "auto" or "balanced", "balanced_low_0"; a string that begins with '{' is a custom
// JSON map, and a bare device ("cpu", "0", "cuda:0") one that puts everything there.
// PlanOptions.custom_json takes both as they are.
absl::StatusOr<MapMode> ParseMapMode(const std::string& text);

struct PlanOptions {
  // Whose rules --hf-compat follows: accelerate's own functions, or the copy inside transformers 5
  // that from_pretrained(device_map=...) calls. They balance differently: accelerate_rules.h.
  enum class HfRules { kAccelerate, kTransformers };

  MapMode mode = MapMode::kAuto;
  std::string custom_json;  // kCustom: {"model.layers.0": 0, "": "cpu", ...}
  bool hf_compat = false;   // Accelerate's map exactly, no KV cache, no workspace; for printing
  HfRules hf_rules = HfRules::kAccelerate;
  uint32_t block_size = 32;      // Tokens per KV block
  uint32_t max_model_len = 0;    // 0 = the model's
  uint32_t max_batch_size = 16;  // Sequences at once
  uint32_t max_batch_tokens = 512;
  uint32_t kv_element_bytes = 4;  // Per element of K and V on the workers: 4 on CPU, 2 on GPU
  uint64_t kv_reserve_bytes =
      0;  // 0 = room for one sequence of max_model_len at least, then all that is left
};

// One stage of the pipeline that a map becomes.
struct StagePlan {
  Device device;
  uint32_t layer_begin = 0;
  uint32_t layer_end = 0;
  bool has_embedding = false;
  bool has_head = false;
  uint64_t limit_bytes = 0;
  uint64_t weight_bytes = 0;
  uint64_t kv_bytes_per_block = 0;
  uint64_t workspace_bytes = 0;
  uint64_t kv_bytes = 0;  // num_blocks * kv_bytes_per_block
  std::string reason;     // Why the stage ends where it ends
};

struct DeviceMapPlan {
  // Module name -> device, collapsed as accelerate does ({"": "0"} when all is on one device), in
  // module order.
  std::vector<std::pair<std::string, Device>> hf_device_map;
  std::vector<StagePlan>
      stages;  // In pipeline order; empty under hf_compat when a pipeline cannot follow the map
  uint32_t num_blocks = 0;       // KV blocks, the minimum over stages
  uint32_t max_concurrency = 0;  // Sequences of max_model_len that fit in num_blocks
  uint32_t max_model_len = 0;
  std::vector<std::string> notes;  // Reserves, skipped devices, copies (tied head), changes
};

// RESOURCE_EXHAUSTED when the model does not fit: says how much is missing where, and which mode or
// option would fit. INVALID_ARGUMENT for a custom map that leaves a parameter without a device,
// names an unknown device, or that a pipeline cannot run.
absl::StatusOr<DeviceMapPlan> PlanDeviceMap(const internal::v1::PlanShardsResponse& model,
                                            const MaxMemory& max_memory,
                                            const PlanOptions& options);

// Text for people (table, then notes) and JSON for programs.
std::string ToText(const DeviceMapPlan& plan);
std::string ToJson(const DeviceMapPlan& plan);

}  // namespace sluice::plan
