// The tensors of a checkpoint folder as they lie in its files, to compare a conversion with.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "gtest/gtest.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/tensor_set.h"

namespace sluice::convert {

// A folder of tests/testdata/checkpoints.
inline std::string Stored(const std::string& name) {
  return SLUICE_TESTDATA "/checkpoints/" + name;
}

class StoredParts {
 public:
  explicit StoredParts(const std::string& path) {
    auto dir = checkpoint::ModelDir::Open(path);
    EXPECT_TRUE(dir.ok()) << dir.status();
    auto set = checkpoint::TensorSet::Open(*dir);
    EXPECT_TRUE(set.ok()) << set.status();
    set_ = std::make_unique<checkpoint::TensorSet>(*std::move(set));
  }

  const checkpoint::TensorSet& set() const { return *set_; }

  // The bytes; empty, and a failure, when there is no such tensor.
  std::string Read(const std::string& name) const {
    const checkpoint::StoredTensor* tensor = set_->Find(name);
    if (tensor == nullptr) {
      ADD_FAILURE() << "no tensor " << name;
      return "";
    }
    std::string bytes(tensor->bytes, '\0');
    EXPECT_TRUE(tensor->file->ReadAt(tensor->offset, tensor->bytes, bytes.data()).ok()) << name;
    return bytes;
  }

 private:
  std::unique_ptr<checkpoint::TensorSet> set_;
};

}  // namespace sluice::convert
