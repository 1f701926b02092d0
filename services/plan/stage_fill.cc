#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "services/plan/pipeline_plan.h"

namespace sluice::plan {
namespace {

constexpr double kNoCap = std::numeric_limits<double>::infinity();

double Needed(const ModelCosts& costs, uint32_t begin, uint32_t end) {
  return static_cast<double>(StageBytes(costs, begin, end, costs.min_blocks));
}

Budgets Numbered(const Budgets& devices) {
  Budgets result;
  for (const auto& entry : devices) {
    if (IsNumbered(entry.first)) {
      result.push_back(entry);
    }
  }
  return result;
}

// Device 0 gets as few layers as the others leave over.
Fill FillLowZero(const ModelCosts& costs, const Budgets& devices) {
  const Budgets others(devices.begin() + 1, devices.end());
  Fill rest = FillEvenly(costs, others);
  if (rest.fits) {
    return rest;
  }
  // The number of layers on device 0 is a bound on it: grow until the others take the rest.
  for (uint32_t count = 1; count <= costs.layers.size(); ++count) {
    Budgets limited = devices;
    limited[0].second = std::min(limited[0].second, Needed(costs, 0, count));
    Fill fill = FillInOrder(costs, limited, kNoCap);
    if (fill.fits) {
      return fill;
    }
  }
  return FillInOrder(costs, devices, kNoCap);
}

}  // namespace

Fill FillInOrder(const ModelCosts& costs, const Budgets& devices, double cap) {
  const uint32_t num_layers = static_cast<uint32_t>(costs.layers.size());
  Fill fill;
  uint32_t begin = 0;
  for (const auto& [device, device_limit] : devices) {
    const double limit = std::min(device_limit, cap);
    if (Needed(costs, begin, num_layers) <= limit) {
      fill.cut.stages.push_back({device, begin, num_layers, "the last layer"});
      fill.next_layer = num_layers;
      fill.fits = true;
      return fill;
    }
    fill.missing_bytes = static_cast<uint64_t>(Needed(costs, begin, num_layers) - limit);
    uint32_t end = begin;
    while (end + 1 < num_layers && Needed(costs, begin, end + 1) <= limit) {
      ++end;
    }
    if (end > begin) {
      const double more = Needed(costs, begin, std::min(end + 1, num_layers)) - limit;
      fill.cut.stages.push_back(
          {device, begin, end,
           absl::StrCat("layer ", end, end + 1 == num_layers ? " with norm and head" : "",
                        " would be ", FormatBytes(more), " too much")});
      begin = end;
    }
    fill.next_layer = begin;
  }
  return fill;
}

Fill FillEvenly(const ModelCosts& costs, const Budgets& devices) {
  Fill best = FillInOrder(costs, devices, kNoCap);
  if (!best.fits) {
    return best;
  }
  const uint32_t num_layers = static_cast<uint32_t>(costs.layers.size());
  uint64_t low = 0;  // Too small
  uint64_t high = StageBytes(costs, 0, num_layers, costs.min_blocks) + costs.tied_table;
  while (high - low > 1) {
    const uint64_t middle = low + (high - low) / 2;
    (FillInOrder(costs, devices, static_cast<double>(middle)).fits ? high : low) = middle;
  }
  best = FillInOrder(costs, devices, static_cast<double>(high));
  for (StageRange& stage : best.cut.stages) {
    if (stage.end < num_layers) {
      stage.reason =
          absl::StrCat("balanced: no stage above ", FormatBytes(static_cast<double>(high)));
    }
  }
  return best;
}

Fill FillByMode(const ModelCosts& costs, const Budgets& devices, MapMode mode) {
  // "cpu" stands in only for what the numbered devices cannot hold.
  const Budgets numbered = Numbered(devices);
  const bool enough = !numbered.empty() && FillInOrder(costs, numbered, kNoCap).fits;
  const Budgets& chosen = enough ? numbered : devices;
  if (mode == MapMode::kSequential || (!enough && !numbered.empty())) {
    return FillInOrder(costs, chosen, kNoCap);
  }
  if (mode == MapMode::kBalancedLow0 && chosen.size() > 1) {
    return FillLowZero(costs, chosen);
  }
  return FillEvenly(costs, chosen);
}

}  // namespace sluice::plan
