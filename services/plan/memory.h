// Budgets: how many bytes may be used on which device, in the order in which devices are filled.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "services/plan/device_map.h"

namespace sluice::plan {

// Device -> bytes, numbers ascending, then "cpu", then "disk". Real numbers, since a quantizer's x
// 0.90 makes fractions, as it does in Python; whole bytes are exact up to 2^53.
using Budgets = std::vector<std::pair<Device, double>>;

// True for "0", "1", ... (a worker by number, what accelerate calls a GPU); false for "cpu" and
// "disk".
bool IsNumbered(const Device& device);

// Number of a numbered device, -1 for "cpu" and "disk".
int NumberOf(const Device& device);

// "0", "cuda:0" -> "0"; "cpu", "disk" as they are; "" for anything else.
Device NormalDevice(const std::string& text);

Budgets InOrder(const MaxMemory& max_memory);

// "1.50 GiB", "620.0 MiB", "17 B".
std::string FormatBytes(double bytes);

}  // namespace sluice::plan
