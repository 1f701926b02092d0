// ThreadPool: runs the pieces of one operation on the caller and a fixed set of helpers.
//
// Made for cores that are shared with others. The caller works too, pieces are taken from a
// counter, and the caller waits only for pieces that someone has begun: a helper that the system
// has put aside costs nothing. A helper looks for the next operation for kSpin, since the
// operations of a step follow each other within microseconds, and then sleeps; an idle pool takes
// no time.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace sluice {

class ThreadPool {
 public:
  static constexpr std::chrono::microseconds kSpin{50};

  // Starts num_threads - 1 helpers. REQUIRES: num_threads >= 1.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Calls body(int64_t index, int thread) once for each index in [0, count), in any order and on
  // any thread (0 = the caller, up to num_threads - 1), and returns when all are done. One caller
  // at a time; body must not throw nor call ParallelFor. Allocates nothing. REQUIRES: 0 <= count <
  // 2^31.
  template <typename Body>
  void ParallelFor(int64_t count, const Body& body) {
    Run(
        count,
        [](const void* context, int64_t index, int thread) {
          (*static_cast<const Body*>(context))(index, thread);
        },
        &body);
  }

 private:
  using Function = void (*)(const void* context, int64_t index, int thread);

  void Run(int64_t count, Function function, const void* context);
  void Helper(int thread);
  bool WorkOn(uint64_t state, int thread);
  bool HasWork(uint64_t state) const;
  void AwaitWork();

  const int num_threads_;

  // The current operation. state_ = number of the operation << 32 | next index; a piece is taken by
  // raising it with compare-and-swap. While the fields below change, the next index is kClosed: a
  // helper that read half-changed fields fails its swap.
  static constexpr uint64_t kClosed = 0xffffffffu;
  std::atomic<uint64_t> state_{kClosed};
  std::atomic<Function> function_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<uint32_t> count_{0};

  alignas(64) std::atomic<int32_t> unfinished_{0};  // Pieces of the operation not yet done
  alignas(64) std::atomic<int32_t> sleeping_{0};    // Helpers asleep or about to be
  std::atomic<int32_t> wake_{0};                    // Helpers sleep on it; raised to wake them
  std::atomic<bool> stop_{false};
  std::vector<std::thread> helpers_;
};

}  // namespace sluice
