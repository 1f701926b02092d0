#include "services/plan/fit_advice.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace sluice::plan {
namespace {

using internal::v1::PlanShardsResponse;

constexpr double kNoCap = std::numeric_limits<double>::infinity();
// Shorter contexts and smaller steps than these are not worth proposing.
constexpr uint32_t kShortestLength = 128;
constexpr uint32_t kSmallBatchTokens = 64;
constexpr uint32_t kSmallBatchSize = 1;

bool Fits(const PlanShardsResponse& model, const Budgets& devices, const PlanOptions& options) {
  return FillInOrder(CostsOf(model, options), devices, kNoCap).fits;
}

// The longest context, in whole blocks, that fits with these options; 0 when not even
// kShortestLength does.
uint32_t LongestLength(const PlanShardsResponse& model, const Budgets& devices,
                       PlanOptions options) {
  const uint32_t length = CostsOf(model, options).max_model_len;
  options.kv_reserve_bytes = 0;
  uint32_t low = 0;
  uint32_t high = length / options.block_size + 1;
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    options.max_model_len = middle * options.block_size;
    (Fits(model, devices, options) ? low : high) = middle;
  }
  const uint32_t longest = low * options.block_size;
  return longest >= kShortestLength && longest < length ? longest : 0;
}

// How much one device must grow for a cut to exist; 0 when growing it alone does not help within
// 2^50 bytes.
double MissingOn(const ModelCosts& costs, Budgets devices, size_t index) {
  const double has = devices[index].second;
  double low = 0;
  double high = 1125899906842624.0;
  devices[index].second = has + high;
  if (!FillInOrder(costs, devices, kNoCap).fits) {
    return 0;
  }
  while (high - low > 1) {
    const double middle = low + (high - low) / 2;
    devices[index].second = has + middle;
    (FillInOrder(costs, devices, kNoCap).fits ? high : low) = middle;
  }
  return high;
}

std::string RoundedUp(double bytes) {
  const double unit = bytes >= 1073741824.0 * 4 ? 1073741824.0 / 4 : 1048576.0;
  const double rounded = (static_cast<uint64_t>(bytes / unit) + 1) * unit;
  return absl::StrCat(static_cast<uint64_t>(rounded / 1048576.0), "MiB");
}

// Options that make the model fit, cheapest first.
std::vector<std::string> Advice(const PlanShardsResponse& model, const Budgets& devices,
                                const PlanOptions& options) {
  std::vector<std::string> advice;
  PlanOptions changed = options;
  changed.kv_reserve_bytes = 0;
  if (options.kv_reserve_bytes != 0 && Fits(model, devices, changed)) {
    advice.push_back("no KV reserve (room for one sequence is kept anyway)");
  }
  if (const uint32_t length = LongestLength(model, devices, options); length != 0) {
    advice.push_back(absl::StrCat("--max-model-len ", length));
  }
  changed = options;
  changed.max_batch_tokens = std::min(options.max_batch_tokens, kSmallBatchTokens);
  changed.max_batch_size = std::min(options.max_batch_size, kSmallBatchSize);
  const std::string small = absl::StrCat("--max-batch-tokens ", changed.max_batch_tokens,
                                         " --max-batch-size ", changed.max_batch_size);
  if (Fits(model, devices, changed)) {
    advice.push_back(small);
  } else if (const uint32_t length = LongestLength(model, devices, changed);
             advice.empty() && length != 0) {
    advice.push_back(absl::StrCat(small, " --max-model-len ", length));
  }
  const ModelCosts costs = CostsOf(model, options);
  for (size_t i = devices.size(); i-- > 0;) {
    if (const double missing = MissingOn(costs, devices, i); missing > 0) {
      advice.push_back(absl::StrCat("--max-memory ", devices[i].first, "=",
                                    RoundedUp(devices[i].second + missing)));
      break;
    }
  }
  const bool has_cpu = !devices.empty() && devices.back().first == "cpu";
  if (!has_cpu) {
    Budgets more = devices;
    more.emplace_back("cpu", 0.0);
    if (const double missing = MissingOn(costs, more, more.size() - 1); missing > 0) {
      advice.push_back(absl::StrCat("one more worker with ", RoundedUp(missing),
                                    " (a CPU worker: cpu=", RoundedUp(missing), ")"));
    }
  }
  return advice;
}

std::string WayOut(const std::vector<std::string>& advice) {
  return advice.empty() ? "Use a smaller or more strongly quantized model, or more workers."
                        : absl::StrCat("What would fit: ", absl::StrJoin(advice, "; or "), ".");
}

std::string Needs(const ModelCosts& costs) {
  const uint32_t layers = static_cast<uint32_t>(costs.layers.size());
  const double kv = static_cast<double>(costs.kv_per_layer_block) * layers * costs.min_blocks;
  return absl::StrCat("weights ", FormatBytes(static_cast<double>(WeightBytes(costs, 0, layers))),
                      ", KV cache ", FormatBytes(kv), " for ", costs.min_blocks, " blocks (",
                      costs.max_model_len, " tokens a sequence), workspace ",
                      FormatBytes(static_cast<double>(WorkspaceBytes(costs, layers))), " a stage");
}

}  // namespace

absl::Status DoesNotFit(const PlanShardsResponse& model, const Budgets& devices,
                        const PlanOptions& options, const Fill& fill) {
  const ModelCosts costs = CostsOf(model, options);
  std::vector<std::string> filled;
  for (const StageRange& stage : fill.cut.stages) {
    filled.push_back(
        absl::StrCat("device ", stage.device, " holds layers ", stage.begin, "-", stage.end - 1));
  }
  for (const auto& [device, limit] : devices) {
    const bool used = std::any_of(fill.cut.stages.begin(), fill.cut.stages.end(),
                                  [&, d = device](const auto& stage) { return stage.device == d; });
    if (!used) {
      filled.push_back(absl::StrCat("device ", device, " (", FormatBytes(limit),
                                    ") is too small for one layer more"));
    }
  }
  const std::string last = devices.empty() ? "" : devices.back().first;
  return absl::ResourceExhaustedError(absl::StrCat(
      "the model does not fit: ", Needs(costs), ". ", absl::StrJoin(filled, ", "), "; layers ",
      fill.next_layer, "-", costs.layers.size() - 1, ", norm and head are left: device ", last,
      " misses ", FormatBytes(static_cast<double>(fill.missing_bytes)), ". ",
      WayOut(Advice(model, devices, options))));
}

absl::Status CustomDoesNotFit(const PlanShardsResponse& model, const Budgets& devices,
                              const PlanOptions& options, const StageCut& cut) {
  const ModelCosts costs = CostsOf(model, options);
  std::vector<std::string> over;
  for (const StageRange& stage : cut.stages) {
    const double needed =
        static_cast<double>(StageBytes(costs, stage.begin, stage.end, costs.min_blocks));
    for (const auto& [device, limit] : devices) {
      if (device == stage.device && needed > limit) {
        over.push_back(absl::StrCat("device ", device, " with layers ", stage.begin, "-",
                                    stage.end - 1, " needs ", FormatBytes(needed), " and may use ",
                                    FormatBytes(limit), ": ", FormatBytes(needed - limit),
                                    " missing"));
      }
    }
  }
  const bool other_map = Fits(model, devices, options);
  return absl::ResourceExhaustedError(absl::StrCat(
      "the custom device map does not fit: ", absl::StrJoin(over, "; "), ". ", Needs(costs), ". ",
      other_map ? "What would fit: --device-map auto or sequential."
                : WayOut(Advice(model, devices, options))));
}

}  // namespace sluice::plan
