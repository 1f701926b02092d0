#include "kernels/cpu/thread_pool.h"

#include "hwy/cache_control.h"
#include "kernels/core/check.h"

namespace sluice {
namespace {

// Calls `ready` until it is true or kSpin has passed; true when it was true.
template <typename Ready>
bool SpinUntil(const Ready& ready) {
  constexpr int kLooksPerClock = 32;  // Reading the clock costs as much as a few looks
  const auto end = std::chrono::steady_clock::now() + ThreadPool::kSpin;
  do {
    for (int i = 0; i < kLooksPerClock; ++i) {
      if (ready()) return true;
      hwy::Pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads) {
  SLUICE_CHECK(num_threads >= 1) << num_threads;
  helpers_.reserve(num_threads - 1);
  for (int i = 1; i < num_threads; ++i) helpers_.emplace_back([this, i] { Helper(i); });
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  wake_.fetch_add(1);
  wake_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

bool ThreadPool::HasWork(uint64_t state) const {
  return (state & kClosed) != kClosed && (state & kClosed) < count_.load(std::memory_order_acquire);
}

// Takes pieces of the operation that `state` shows until none is left. False when nothing was
// taken.
bool ThreadPool::WorkOn(uint64_t state, int thread) {
  const uint64_t operation = state >> 32;
  bool worked = false;
  while (state >> 32 == operation && HasWork(state)) {
    const Function function = function_.load(std::memory_order_acquire);
    const void* context = context_.load(std::memory_order_acquire);
    if (!state_.compare_exchange_weak(state, state + 1)) continue;
    function(context, static_cast<int64_t>(state & kClosed), thread);
    worked = true;
    if (unfinished_.fetch_sub(1) == 1) unfinished_.notify_all();
    state = state_.load();
  }
  return worked;
}

void ThreadPool::Run(int64_t count, Function function, const void* context) {
  SLUICE_CHECK(count >= 0 && count < (int64_t{1} << 31)) << count;
  if (num_threads_ == 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) function(context, i, 0);
    return;
  }
  const uint64_t operation = ((state_.load() >> 32) + 1) << 32;
  state_.store(operation | kClosed);
  function_.store(function, std::memory_order_release);
  context_.store(context, std::memory_order_release);
  count_.store(static_cast<uint32_t>(count), std::memory_order_release);
  unfinished_.store(static_cast<int32_t>(count));
  state_.store(operation);
  if (sleeping_.load() > 0) {
    wake_.fetch_add(1);
    wake_.notify_all();
  }
  WorkOn(operation, /*thread=*/0);
  if (SpinUntil([this] { return unfinished_.load() == 0; })) return;
  for (int32_t left = unfinished_.load(); left != 0; left = unfinished_.load()) {
    unfinished_.wait(left);
  }
}

void ThreadPool::AwaitWork() {
  if (SpinUntil([this] { return stop_.load() || HasWork(state_.load()); })) return;
  sleeping_.fetch_add(1);
  const int32_t wake = wake_.load();
  // Either this look sees the new operation, or its caller sees this helper in sleeping_ and raises
  // wake_.
  if (!stop_.load() && !HasWork(state_.load())) wake_.wait(wake);
  sleeping_.fetch_sub(1);
}

void ThreadPool::Helper(int thread) {
  while (!stop_.load()) {
    if (!WorkOn(state_.load(), thread)) AwaitWork();
  }
}

}  // namespace sluice
