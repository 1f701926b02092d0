// BlockAllocator: which KV blocks are whose. One copy for all stages: an id that is handed out here
// is valid on every stage, since every stage has num_blocks of them. Owned by the scheduler's
// thread.
//
//   free + used + cached = total, always. Nothing is cached yet: blocks kept for reuse by a later
//   prompt will be.
#pragma once

#include <cstdint>
#include <vector>

namespace sluice::controller {

class BlockAllocator {
 public:
  // Ids 0 .. total - 1, all free.
  explicit BlockAllocator(uint32_t total);

  // Takes `count` blocks, all or none. False: fewer are free, and `ids` is unchanged.
  bool Allocate(uint32_t count, std::vector<uint32_t>* ids);

  // Gives blocks back. Giving back a block that is not used ends the process: two sequences would
  // share it later.
  void Free(const std::vector<uint32_t>& ids);

  uint32_t free() const { return static_cast<uint32_t>(free_ids_.size()); }
  uint32_t used() const { return used_; }
  uint32_t cached() const { return 0; }
  uint32_t total() const { return static_cast<uint32_t>(is_used_.size()); }

 private:
  std::vector<uint32_t> free_ids_;  // A stack: the block freed last is warm in caches
  std::vector<bool> is_used_;       // By id
  uint32_t used_ = 0;
};

}  // namespace sluice::controller
