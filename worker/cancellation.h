// Cancellation: lets one thread end the work that another is doing (loading a shard, opening a
// link).
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <utility>

namespace sluice::worker {

// Thread-safe. Once cancelled, it stays so.
class Cancellation {
 public:
  // Runs the action of the scope that is open now, if there is one.
  void Cancel() {
    std::lock_guard<std::mutex> lock(mutex_);
    cancelled_ = true;
    if (action_) {
      action_();
    }
    changed_.notify_all();
  }

  bool cancelled() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return cancelled_;
  }

  // Sleeps; true as soon as it is cancelled.
  bool WaitFor(std::chrono::milliseconds time) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, time, [this] { return cancelled_; });
  }

  // While it lives, Cancel() runs `action` (quick, and must not call back); at once if it was
  // cancelled before. One scope at a time.
  class Scope {
   public:
    Scope(Cancellation* owner, std::function<void()> action) : owner_(owner) {
      std::lock_guard<std::mutex> lock(owner_->mutex_);
      owner_->action_ = std::move(action);
      if (owner_->cancelled_) {
        owner_->action_();
      }
    }
    ~Scope() {
      std::lock_guard<std::mutex> lock(owner_->mutex_);
      owner_->action_ = nullptr;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Cancellation* owner_;
  };

 private:
  mutable std::mutex mutex_;  // Guards all below
  std::condition_variable changed_;
  bool cancelled_ = false;
  std::function<void()> action_;
};

}  // namespace sluice::worker
