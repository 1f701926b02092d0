#include "services/loader/memory_budget.h"

#include <algorithm>

namespace sluice::loader {

MemoryBudget::Share MemoryBudget::Acquire(uint64_t bytes, const std::stop_token& stop) {
  std::unique_lock<std::mutex> lock(mutex_);
  const uint64_t ticket = next_ticket_++;
  waiting_.push_back(ticket);
  const bool granted = changed_.wait(lock, stop, [&] {
    return waiting_.front() == ticket && (held_ == 0 || held_ + bytes <= capacity_);
  });
  waiting_.erase(std::find(waiting_.begin(), waiting_.end(), ticket));
  if (granted) held_ += bytes;
  changed_.notify_all();  // Somebody else is first in line now.
  return granted ? Share(this, bytes) : Share();
}

void MemoryBudget::Release(uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  held_ -= bytes;
  changed_.notify_all();
}

}  // namespace sluice::loader
