// Checkpoint: a model directory or file opened for reading, whatever its container and
// quantization, seen as one ordered list of canonical tensors. Nothing is read but headers and
// small files until Read() is called. Thread-safe after Open(): reads use pread and share no
// position.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/quant.h"
#include "proto/sluice/internal/v1/weights.pb.h"

namespace sluice::checkpoint {

class Checkpoint {
 public:
  virtual ~Checkpoint() = default;

  // `model`: a Hugging Face folder (config.json with weights in safetensors or PyTorch's .bin,
  // single or sharded), a .gguf file, or the name of a model in the Hugging Face cache, there at
  // `revision` (hf_cache.h). Every size, shape and name is checked here, from headers. Errors name
  // file, tensor or field, the rule and the way out: NOT_FOUND (nothing there, lists what was
  // looked for and what is there), INVALID_ARGUMENT (broken), UNIMPLEMENTED (unsupported, by name).
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& model,
                                                          const std::string& revision = "");

  // Model, tensors (loader's order), source tensors, files, quantization, warnings, digest.
  const internal::v1::PlanShardsResponse& description() const { return description_; }

  // Canonical tensor number `index` of description().tensors(), converted in one piece.
  // INVALID_ARGUMENT when values break a rule (g_idx out of range, a scale that is not finite),
  // DATA_LOSS when the file changed.
  virtual absl::StatusOr<QuantizedMatrix> Read(int index) const = 0;

  // Plain tensors only, for slabs: bytes [offset, offset + size) of the canonical planes of tensor
  // `index` into `out`.
  virtual absl::Status ReadPlain(int index, uint64_t offset, uint64_t size, uint8_t* out) const = 0;

  // Content of a file of description().files(). NOT_FOUND for any other name.
  virtual absl::StatusOr<std::string> ReadFile(const std::string& name) const = 0;

 protected:
  internal::v1::PlanShardsResponse description_;
};

}  // namespace sluice::checkpoint
