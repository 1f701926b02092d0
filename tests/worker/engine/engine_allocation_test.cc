// A decode step allocates nothing: operator new is counted while it runs.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "tests/worker/engine/small_model.h"
#include "tests/worker/engine/test_pipeline.h"

namespace {
std::atomic<int> allocations{0};
}  // namespace

void* operator new(size_t size) {
  ++allocations;
  void* memory = std::malloc(size);
  if (memory == nullptr) std::abort();
  return memory;
}
void* operator new(size_t size, std::align_val_t alignment) {
  ++allocations;
  const auto align = static_cast<size_t>(alignment);
  void* memory = std::aligned_alloc(align, (size + align - 1) / align * align);
  if (memory == nullptr) std::abort();
  return memory;
}
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace sluice::worker {
namespace {

using internal::v1::StepHeader;

// Allocations of one greedy decode step of two sequences on stage 0 of one, in its steady state.
int AllocationsOfAStep(const SmallModel& model) {
  TestPipeline pipeline(model, 1);
  TestSequence a = MakeSequence(1, {3, 1, 4, 15, 9}), b = MakeSequence(2, {9, 8, 7});
  pipeline.RunSlice(&a, 5, /*sample=*/true);
  pipeline.RunSlice(&b, 3, /*sample=*/true);
  StageEngine::StepOutput output;
  int counted = -1;
  for (uint64_t step = pipeline.last_step() + 1; step < 20; ++step) {
    StepHeader header;
    header.set_step(step);
    // With one stage the engine keeps its own samples: the step before, of each sequence.
    const uint64_t ahead_of_a = step == 3 ? 1 : step - 1;
    *header.add_sequences() = pipeline.NextSlice(&a, 1, /*sample=*/true, ahead_of_a);
    *header.add_sequences() = pipeline.NextSlice(&b, 1, /*sample=*/true, step - 1);
    const int before = allocations;
    const absl::Status status = pipeline.last().Step({.header = &header}, &output);
    counted = allocations - before;
    EXPECT_TRUE(status.ok()) << status;
  }
  return counted;
}

TEST(EngineAllocationTest, TheCounterCounts) {
  const int before = allocations;
  const std::vector<int> vector(1000);
  EXPECT_EQ(allocations - before, 1) << vector.size();
}

TEST(EngineAllocationTest, DecodeStepsAllocateNothing) {
  EXPECT_EQ(AllocationsOfAStep(MakeLlama(1)), 0);
  EXPECT_EQ(AllocationsOfAStep(MakeTiedDynamicLlama(1)), 0);
  EXPECT_EQ(AllocationsOfAStep(MakeOpt350m(1)), 0);
}

}  // namespace
}  // namespace sluice::worker
