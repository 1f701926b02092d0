// A source format is a way to make one canonical tensor from what lies in a file. For each there is
// a function that checks headers and returns a TensorReader; the reader converts when asked. This
// is the only place, with format_*.cc, that knows source names (qweight, qzeros, g_idx, absmax,
// ...).
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/quant.h"
#include "services/checkpoint/gguf.h"
#include "services/checkpoint/layout.h"
#include "services/checkpoint/quant_config.h"
#include "services/checkpoint/tensor_set.h"

namespace sluice::checkpoint {

// Source data is converted in pieces of about this size, so that a conversion holds one canonical
// tensor and little else.
inline constexpr uint64_t kSlabBytes = 4 << 20;

// Makes one canonical tensor. Immutable and thread-safe; refers to files that outlive it.
class TensorReader {
 public:
  explicit TensorReader(const QuantSpec& spec) : spec_(spec) {}
  virtual ~TensorReader() = default;
  const QuantSpec& spec() const { return spec_; }

  // The whole tensor. INVALID_ARGUMENT for values that break a rule, DATA_LOSS when the file
  // changed.
  virtual absl::StatusOr<QuantizedMatrix> Read() const = 0;

  // Plain tensors: bytes [offset, offset + size) of the elements. INVALID_ARGUMENT for quantized
  // ones.
  virtual absl::Status ReadPlain(uint64_t offset, uint64_t size, uint8_t* out) const;

 private:
  const QuantSpec spec_;
};

// Where the parts of one tensor are looked up: `expected` as the model's configuration wants it,
// `base` the name in the file without ".weight".
struct TensorRequest {
  const TensorSet* set = nullptr;
  ExpectedTensor expected;
  std::string base;
  // A ".bias" that lies beside the weights though the architecture has none: must hold zeros. Null:
  // there is none.
  const StoredTensor* unused_bias = nullptr;
};

using TensorReaderOr = absl::StatusOr<std::unique_ptr<TensorReader>>;

// Vectors, embeddings and unquantized linears: `base` is the full name here.
TensorReaderOr MakePlainReader(const TensorRequest& request);

// A GPTQ linear, 4 bit. Reads g_idx (4 bytes a column) to see whether there is act-order.
TensorReaderOr MakeGptqReader(const TensorRequest& request, const QuantConfig& config);

// An AWQ linear, GEMM layout.
TensorReaderOr MakeAwqReader(const TensorRequest& request, const QuantConfig& config);

// A bitsandbytes NF4 or FP4 linear. Reads its description (a JSON text of about 200 bytes).
TensorReaderOr MakeBnbReader(const TensorRequest& request);
// "nf4", "fp4", with "+nested", of a linear that MakeBnbReader accepts; empty when `base` is no
// such linear.
std::string BnbKind(const TensorSet& set, const std::string& base);

// A tensor of a GGUF file. `heads` > 0: rows are permuted for adjacent-pair rope and are put back
// into Hugging Face's order, head by head.
TensorReaderOr MakeGgufReader(const GgufFile& gguf, const GgufTensor& tensor,
                              const ExpectedTensor& expected, uint32_t heads);

// Helpers of the formats
// The tensor `base` + `part`, e.g. ".qweight". INVALID_ARGUMENT when it is missing.
absl::StatusOr<StoredTensor> FindPart(const TensorRequest& request, const char* part);

// -------------------------------------------------------------------------------------------

// INVALID_ARGUMENT, naming tensor, file, what is there and what is wanted, unless dtype and shape
// agree.
absl::Status CheckStored(const StoredTensor& tensor, const std::string& dtype, const Shape& shape);

// All bytes of a tensor.
absl::Status ReadStored(const StoredTensor& tensor, void* out);
// Bytes [offset, offset + size) of a tensor.
absl::Status ReadStoredAt(const StoredTensor& tensor, uint64_t offset, uint64_t size, void* out);

// INVALID_ARGUMENT unless every element of `bytes` bytes is finite; `index` is the number of the
// first element.
absl::Status CheckFinitePlain(DType dtype, const uint8_t* data, uint64_t bytes, uint64_t index);

// INVALID_ARGUMENT unless the extra bias of a quantized linear is all zeros.
absl::Status CheckUnusedBias(const StoredTensor* bias);

}  // namespace sluice::checkpoint
