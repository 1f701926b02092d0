// What this machine can do at most: the figures that kernel_bench compares with.
#pragma once

#include <cstdint>

#include "kernels/cpu/thread_pool.h"

namespace sluice {

// Reads `count` floats with all threads of the pool, in vectors; the sum keeps the reads alive.
float ReadAll(const float* data, int64_t count, ThreadPool& pool);

// Runs multiply-adds on registers alone, on every thread of the pool; returns how many
// floating-point operations.
int64_t MultiplyAddAll(int64_t rounds, ThreadPool& pool, float* sink);

}  // namespace sluice
