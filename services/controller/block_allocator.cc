#include "services/controller/block_allocator.h"

#include <cstdio>
#include <cstdlib>

namespace sluice::controller {

BlockAllocator::BlockAllocator(uint32_t total) : is_used_(total, false) {
  free_ids_.reserve(total);
  for (uint32_t i = 0; i < total; ++i) {
    free_ids_.push_back(total - 1 - i);  // Low ids first
  }
}

bool BlockAllocator::Allocate(uint32_t count, std::vector<uint32_t>* ids) {
  if (count > free_ids_.size()) {
    return false;
  }
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t id = free_ids_.back();
    free_ids_.pop_back();
    is_used_[id] = true;
    ids->push_back(id);
  }
  used_ += count;
  return true;
}

void BlockAllocator::Free(const std::vector<uint32_t>& ids) {
  for (const uint32_t id : ids) {
    if (id >= is_used_.size() || !is_used_[id]) {
      std::fprintf(stderr, "BlockAllocator: block %u is given back but not used\n", id);
      std::abort();
    }
    is_used_[id] = false;
    free_ids_.push_back(id);
  }
  used_ -= static_cast<uint32_t>(ids.size());
}

}  // namespace sluice::controller
