// ReaderCheckpoint: what the two kinds of checkpoint (Hugging Face folder, GGUF file) have in
// common: a list of readers in the loader's order, small files, and the description made from them.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/format.h"

namespace sluice::checkpoint {

inline constexpr uint64_t kMaxSmallFileBytes = 64 << 20;

class ReaderCheckpoint : public Checkpoint {
 public:
  absl::StatusOr<QuantizedMatrix> Read(int index) const override;
  absl::Status ReadPlain(int index, uint64_t offset, uint64_t size, uint8_t* out) const override;

 protected:
  // Appends a tensor to readers and description.
  void AddReader(const std::string& name, std::unique_ptr<TensorReader> reader);
  void AddSource(const std::string& name, const SourceDType& dtype, const Shape& shape,
                 uint64_t bytes);
  // Sums bits, group size and act-order up into description().quant().
  void SummarizeQuantization(const std::string& method, const std::string& detail);

 private:
  std::vector<std::unique_ptr<TensorReader>> readers_;
};

// The two kinds. `name`: file of `dir`.
absl::StatusOr<std::unique_ptr<Checkpoint>> OpenHfCheckpoint(ModelDir dir);
absl::StatusOr<std::unique_ptr<Checkpoint>> OpenGgufCheckpoint(const ModelDir& dir,
                                                               const std::string& name);

}  // namespace sluice::checkpoint
