// Counter, Gauge and Histogram: numbers that any thread may change at any time and a scrape reads.
// Changing one is a relaxed atomic operation or two: no lock, no allocation, no system call, so the
// code that runs a step may own them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"

namespace sluice::metrics {

class Counter {
 public:
  void Add(uint64_t amount = 1) { value_.fetch_add(amount, std::memory_order_relaxed); }
  uint64_t value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> value_{0};
};

class Gauge {
 public:
  void Set(double value) { value_.store(value, std::memory_order_relaxed); }
  double value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<double> value_{0};
};

// How many values fell into each bucket, and their sum.
class Histogram {
 public:
  // `bounds`: upper ends of the buckets, inclusive, ascending; a last one without end is added.
  // They are constants: they must outlive the histogram.
  explicit Histogram(absl::Span<const double> bounds)
      : bounds_(bounds), counts_(new std::atomic<uint64_t>[bounds.size() + 1]()) {}

  void Observe(double value) {
    size_t bucket = 0;
    while (bucket < bounds_.size() && value > bounds_[bucket]) {
      ++bucket;
    }
    counts_[bucket].fetch_add(1, std::memory_order_relaxed);
    sum_.fetch_add(value, std::memory_order_relaxed);
  }

  absl::Span<const double> bounds() const { return bounds_; }
  // By bucket, not cumulative; bounds().size() + 1 numbers.
  std::vector<uint64_t> counts() const {
    std::vector<uint64_t> counts;
    for (size_t i = 0; i <= bounds_.size(); ++i) {
      counts.push_back(counts_[i].load(std::memory_order_relaxed));
    }
    return counts;
  }
  double sum() const { return sum_.load(std::memory_order_relaxed); }

 private:
  const absl::Span<const double> bounds_;
  const std::unique_ptr<std::atomic<uint64_t>[]> counts_;
  std::atomic<double> sum_{0};
};

}  // namespace sluice::metrics
