#include "services/convert/convert.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "kernels/core/status_macros.h"
#include "services/convert/bnb.h"
#include "services/convert/folder_files.h"
#include "services/convert/int4.h"
#include "services/convert/output_folder.h"
#include "services/convert/output_tensor.h"
#include "services/convert/weight_rows.h"
#include "services/convert/weights_writer.h"

namespace sluice::convert {
namespace {

using checkpoint::Checkpoint;
using Encoding = PlannedTensor::Encoding;

constexpr int64_t kSlabElements = 1 << 20;

// Elements of a plain tensor in the type of the output.
Bytes PlainBytes(const std::vector<float>& values, size_t count, DType dtype) {
  Bytes out(count * SizeOf(dtype));
  for (size_t i = 0; i < count; ++i) {
    if (dtype == DType::kF32) {
      std::memcpy(&out[4 * i], &values[i], 4);
      continue;
    }
    const uint16_t bits =
        dtype == DType::kF16 ? FloatToHalf(values[i]) : FloatToBFloat16(values[i]);
    std::memcpy(&out[2 * i], &bits, 2);
  }
  return out;
}

class Conversion {
 public:
  Conversion(const Checkpoint& source, const ConvertOptions& options,
             const ConvertProgress& progress)
      : source_(source), options_(options), progress_(progress) {}

  absl::Status Plan() {
    SLUICE_ASSIGN_OR_RETURN(plan_, PlanTensors(source_, options_));
    SLUICE_ASSIGN_OR_RETURN(files_, FolderFiles(source_, options_));
    for (const PlannedTensor& planned : plan_) {
      total_ += static_cast<uint64_t>(planned.n) * static_cast<uint64_t>(planned.k);
      result_.tensors += planned.parts.size();
      result_.quantized += planned.encoding == Encoding::kPlain ? 0 : 1;
      for (const OutputTensor& part : planned.parts) result_.weight_bytes += part.bytes;
    }
    const std::string& method = source_.description().quant().method();
    if (method != "none") {
      result_.notes.push_back(absl::StrCat("the source is quantized already (", method, " ",
                                           source_.description().quant().detail(),
                                           "): its own loss is part of the result"));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<ConvertResult> Write(const std::string& output) {
    uint64_t bytes = result_.weight_bytes;
    for (const auto& [name, content] : files_) bytes += content.size();
    SLUICE_ASSIGN_OR_RETURN(OutputFolder folder, OutputFolder::Create(output, bytes));
    for (const auto& [name, content] : files_) {
      SLUICE_RETURN_IF_ERROR(folder.WriteFile(name, content));
    }
    SLUICE_ASSIGN_OR_RETURN(WeightsWriter writer,
                            WeightsWriter::Create(folder.path(), plan_, options_.max_shard_bytes));
    for (const PlannedTensor& planned : plan_) {
      SLUICE_RETURN_IF_ERROR(WriteTensor(planned, writer));
    }
    SLUICE_RETURN_IF_ERROR(writer.Close());
    result_.files = writer.num_files();
    if (const auto written = Checkpoint::Open(folder.path()); !written.ok()) {
      return absl::InternalError(absl::StrCat("what was written cannot be read back: ",
                                              std::string(written.status().message())));
    }
    SLUICE_RETURN_IF_ERROR(folder.Commit());
    return std::move(result_);
  }

 private:
  absl::Status WriteTensor(const PlannedTensor& planned, const WeightsWriter& writer) {
    SLUICE_ASSIGN_OR_RETURN(const WeightRows rows, WeightRows::Open(source_, planned.index));
    std::vector<Bytes> parts;
    switch (planned.encoding) {
      case Encoding::kPlain:
        return WritePlain(planned, rows, writer);
      case Encoding::kBnb: {
        SLUICE_ASSIGN_OR_RETURN(parts,
                                QuantizeBnb(rows, NameOf(options_.format), options_.double_quant));
        break;
      }
      case Encoding::kGptq: {
        SLUICE_ASSIGN_OR_RETURN(const QuantizedMatrix matrix,
                                QuantizeInt4(rows, planned.group_size, options_.symmetric));
        parts = PackGptq(matrix, /*zeros_minus_one=*/options_.symmetric);
        break;
      }
      case Encoding::kAwq: {
        SLUICE_ASSIGN_OR_RETURN(const QuantizedMatrix matrix,
                                QuantizeInt4(rows, planned.group_size, /*symmetric=*/false));
        parts = PackAwq(matrix);
        break;
      }
    }
    SLUICE_CHECK(parts.size() == planned.parts.size()) << planned.parts[0].name;
    for (size_t i = 0; i < parts.size(); ++i) {
      const OutputTensor& part = planned.parts[i];
      SLUICE_CHECK(parts[i].size() == part.bytes) << part.name;
      SLUICE_RETURN_IF_ERROR(writer.Write(part.name, 0, parts[i].data(), parts[i].size()));
    }
    return Progress(planned.n * planned.k);
  }

  absl::Status WritePlain(const PlannedTensor& planned, const WeightRows& rows,
                          const WeightsWriter& writer) {
    const DType dtype = options_.format == Format::kFloat32    ? DType::kF32
                        : options_.format == Format::kBFloat16 ? DType::kBF16
                                                               : DType::kF16;
    const int64_t slab = std::clamp<int64_t>(kSlabElements / planned.k, 1, planned.n);
    std::vector<float> values(static_cast<size_t>(slab * planned.k));
    for (int64_t first = 0; first < planned.n; first += slab) {
      const int64_t count = std::min(slab, planned.n - first);
      SLUICE_RETURN_IF_ERROR(rows.Read(first, count, dtype, values.data()));
      const Bytes bytes = PlainBytes(values, static_cast<size_t>(count * planned.k), dtype);
      const uint64_t offset = static_cast<uint64_t>(first * planned.k) * SizeOf(dtype);
      SLUICE_RETURN_IF_ERROR(
          writer.Write(planned.parts[0].name, offset, bytes.data(), bytes.size()));
      SLUICE_RETURN_IF_ERROR(Progress(count * planned.k));
    }
    return absl::OkStatus();
  }

  absl::Status Progress(int64_t weights) {
    done_ += static_cast<uint64_t>(weights);
    return progress_(done_, total_) ? absl::OkStatus()
                                    : absl::CancelledError("stopped; nothing was written");
  }

  const Checkpoint& source_;
  const ConvertOptions& options_;
  const ConvertProgress& progress_;
  std::vector<PlannedTensor> plan_;
  std::map<std::string, std::string> files_;
  ConvertResult result_;
  uint64_t done_ = 0, total_ = 0;
};

}  // namespace

const char* NameOf(Format format) {
  switch (format) {
    case Format::kFloat16:
      return "fp16";
    case Format::kBFloat16:
      return "bf16";
    case Format::kFloat32:
      return "fp32";
    case Format::kGptq:
      return "gptq";
    case Format::kAwq:
      return "awq";
    case Format::kNf4:
      return "nf4";
    case Format::kFp4:
      return "fp4";
  }
  return "unknown";
}

absl::StatusOr<ConvertResult> Convert(const Checkpoint& source, const ConvertOptions& options,
                                      const std::string& output, const ConvertProgress& progress) {
  Conversion conversion(source, options, progress);
  SLUICE_RETURN_IF_ERROR(conversion.Plan());
  return conversion.Write(output);
}

}  // namespace sluice::convert
