// MemoryBudget: bytes of converted tensors that all Fetch streams together may hold. What keeps the
// loader small however many workers pull at once.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <stop_token>
#include <utility>

namespace sluice::loader {

// Thread-safe. First come, first served, so that a large tensor is not passed by small ones for
// ever.
class MemoryBudget {
 public:
  // A share of the budget, given back when it is destroyed.
  class Share {
   public:
    Share() = default;
    Share(MemoryBudget* budget, uint64_t bytes) : budget_(budget), bytes_(bytes) {}
    Share(Share&& other) noexcept
        : budget_(std::exchange(other.budget_, nullptr)), bytes_(other.bytes_) {}
    Share& operator=(Share&& other) noexcept {
      std::swap(budget_, other.budget_);
      std::swap(bytes_, other.bytes_);
      return *this;
    }
    ~Share() {
      if (budget_ != nullptr) budget_->Release(bytes_);
    }
    explicit operator bool() const { return budget_ != nullptr; }

   private:
    MemoryBudget* budget_ = nullptr;
    uint64_t bytes_ = 0;
  };

  explicit MemoryBudget(uint64_t capacity) : capacity_(capacity) {}

  // Waits until `bytes` fit; more than the whole capacity is granted when nothing else is held. An
  // empty share when `stop` was requested. The budget must outlive the share.
  Share Acquire(uint64_t bytes, const std::stop_token& stop);

 private:
  void Release(uint64_t bytes);

  const uint64_t capacity_;
  std::mutex mutex_;  // Guards what follows.
  std::condition_variable_any changed_;
  uint64_t held_ = 0;
  uint64_t next_ticket_ = 0;
  std::deque<uint64_t> waiting_;  // Tickets, oldest first.
};

}  // namespace sluice::loader
