// The stream of weights from the loader to a worker. Input as in frame_fuzz.cc.
#include <google/protobuf/stubs/logging.h>

#include "kernels/core/check.h"
#include "services/rpc/crc32c.h"
#include "tests/fuzz/fuzz_target.h"
#include "worker/tensor_assembler.h"

namespace sluice::fuzz {
namespace {

using internal::v1::FetchResponse;

constexpr uint64_t kMaxTensorBytes = 1 << 16;

void AddPart(FetchResponse* part, std::string* out) {
  part->set_crc32c(rpc::Crc32c(part->data().data(), part->data().size()));
  const std::string bytes = part->SerializeAsString();
  out->push_back(static_cast<char>(bytes.size() & 0xFF));
  out->push_back(static_cast<char>(bytes.size() >> 8));
  *out += bytes;
}

std::string Tensor(QuantFormat format, int64_t n, int64_t k, int64_t group_size) {
  QuantSpec spec;
  spec.format = format;
  spec.plain_dtype = DType::kF16;
  spec.scale_dtype = DType::kF16;
  spec.n = n;
  spec.k = k;
  spec.group_size = group_size;
  const uint64_t bytes = SizesOf(spec).total();
  FetchResponse part;
  part.set_name("a.weight");
  auto* proto = part.mutable_spec();
  proto->set_name("a.weight");
  proto->set_format(static_cast<uint32_t>(format));
  proto->set_plain_dtype(static_cast<uint32_t>(spec.plain_dtype));
  proto->set_scale_dtype(static_cast<uint32_t>(spec.scale_dtype));
  proto->set_n(static_cast<uint64_t>(n));
  proto->set_k(static_cast<uint64_t>(k));
  proto->set_group_size(static_cast<uint64_t>(group_size));
  proto->set_bytes(bytes);
  std::string out;
  part.set_data(std::string(bytes / 2, '\1'));
  AddPart(&part, &out);
  part.clear_spec();
  part.set_part(1);
  part.set_offset(bytes / 2);
  part.set_data(std::string(bytes - bytes / 2, '\1'));
  part.set_last(true);
  AddPart(&part, &out);
  return out;
}

}  // namespace

std::vector<std::string> Seeds() {
  return {
      '\1' + Tensor(QuantFormat::kPlain, 2, 8, 0), '\1' + Tensor(QuantFormat::kInt4Zero, 2, 64, 32),
      '\0' + Tensor(QuantFormat::kTable4, 1, 64, 64), '\1' + Tensor(QuantFormat::kInt8, 1, 32, 32)};
}

}  // namespace sluice::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace sluice;  // NOLINT(google-build-using-namespace)
  // protobuf would print a line for each string that is no UTF-8.
  [[maybe_unused]] static auto* const before = google::protobuf::SetLogHandler(nullptr);
  if (size == 0) return 0;
  const bool repair = data[0] % 2 == 1;
  worker::TensorAssembler assembler(
      fuzz::kMaxTensorBytes, [](const std::string&, const QuantizedMatrix& tensor) {
        SLUICE_CHECK(tensor.planes.size() <= fuzz::kMaxTensorBytes) << tensor.planes.size();
        return CheckValues(tensor);
      });
  for (size_t at = 1; size - at >= 2;) {
    const size_t length = data[at] | size_t{data[at + 1]} << 8;
    at += 2;
    if (length > size - at) return 0;
    internal::v1::FetchResponse part;
    if (!part.ParseFromArray(data + at, static_cast<int>(length))) return 0;
    at += length;
    const std::string& bytes = part.data();
    if (repair) part.set_crc32c(rpc::Crc32c(bytes.data(), bytes.size()));
    if (!assembler.Add(part).ok()) return 0;
  }
  (void)assembler.Finish();
  return 0;
}
