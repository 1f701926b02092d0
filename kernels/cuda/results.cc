// What of a step comes back to the host: sampled tokens, scores and rows of activations.
#include <algorithm>
#include <cstring>

#include "kernels/core/check.h"
#include "kernels/core/status_macros.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/sampling.h"

namespace sluice {
namespace {

bool IsPlainArgmax(const SamplingRow& row) {
  return row.temperature == 0.0f && row.repetition_penalty == 1.0f &&
         row.presence_penalty == 0.0f && row.frequency_penalty == 0.0f && row.banned_ids.empty() &&
         row.num_logprobs < 0;
}

// Appends ids to the list that goes to the device and says where they begin.
int32_t Append(absl::Span<const uint32_t> ids, uint32_t* list, int64_t capacity, int64_t* used) {
  SLUICE_CHECK(*used + static_cast<int64_t>(ids.size()) <= capacity)
      << "token histories exceed Reserve";
  const int64_t begin = *used;
  std::copy(ids.begin(), ids.end(), list + begin);
  *used += static_cast<int64_t>(ids.size());
  return static_cast<int32_t>(begin);
}

DeviceSamplingRow ToDevice(const SamplingRow& row) {
  DeviceSamplingRow out;
  out.row = row.row;
  out.seed = row.seed;
  out.choice = row.choice;
  out.token_index = row.token_index;
  out.temperature = row.temperature;
  out.top_k = row.top_k;
  out.top_p = row.top_p;
  out.min_p = row.min_p;
  out.repetition_penalty = row.repetition_penalty;
  out.presence_penalty = row.presence_penalty;
  out.frequency_penalty = row.frequency_penalty;
  out.num_logprobs = std::min(row.num_logprobs, kMaxTopLogprobs);
  return out;
}

void FromDevice(const DeviceSampledToken& token, bool wants_logprob, SampledToken& out) {
  out.token_id = token.token_id;
  out.finite = token.finite != 0;
  out.top.clear();
  if (!wants_logprob || !out.finite) return;
  out.logprob = token.logprob;
  for (uint32_t i = 0; i < token.num_top; ++i) {
    out.top.push_back({token.top_ids[i], token.top_logprobs[i]});
  }
}

}  // namespace

absl::Status CudaBackend::ReserveSampling(const Workspace& workspace) {
  sampling_rows_ = std::max<int64_t>(workspace.max_sequences, 1);
  sampling_ids_ = sampling_rows_ * (workspace.max_context + kMaxBannedIds);
  const int64_t bytes = sampling_rows_ * static_cast<int64_t>(sizeof(DeviceSampledToken) +
                                                              sizeof(DeviceSamplingRow)) +
                        sampling_ids_ * int64_t{sizeof(uint32_t)};
  if (workspace.vocab == 0) return absl::OkStatus();
  if (bytes > sampling_memory_.bytes()) {
    SLUICE_ASSIGN_OR_RETURN(sampling_memory_, DeviceMemory::Allocate(bytes));
    SLUICE_ASSIGN_OR_RETURN(sampling_host_, PinnedMemory::Allocate(bytes));
  }
  const int64_t scratch = SamplingScratchBytes(sampling_rows_, workspace.vocab);
  SLUICE_ASSIGN_OR_RETURN(sampling_scratch_, DeviceMemory::Allocate(scratch));
  return absl::OkStatus();
}

void CudaBackend::RunSampling(TensorView logits, absl::Span<const SamplingRow> rows,
                              int32_t forced_id, absl::Span<SampledToken> out) {
  const auto count = static_cast<int64_t>(rows.size());
  SLUICE_CHECK(count <= sampling_rows_ && out.size() == rows.size()) << count << " rows";
  // Results | rows | ids, on both sides.
  const int64_t rows_at = sampling_rows_ * int64_t{sizeof(DeviceSampledToken)};
  const int64_t ids_at = rows_at + sampling_rows_ * int64_t{sizeof(DeviceSamplingRow)};
  auto* host_rows = reinterpret_cast<DeviceSamplingRow*>(sampling_host_.as<uint8_t>() + rows_at);
  auto* host_ids = reinterpret_cast<uint32_t*>(sampling_host_.as<uint8_t>() + ids_at);
  int64_t used = 0;
  bool argmax = forced_id < 0;
  for (int64_t i = 0; i < count; ++i) {
    const SamplingRow& row = rows[i];
    DeviceSamplingRow& target = host_rows[i] = ToDevice(row);
    target.forced_id = forced_id;
    argmax = argmax && IsPlainArgmax(row);
    if (row.repetition_penalty != 1.0f) {
      target.prompt_begin = Append(row.prompt_ids, host_ids, sampling_ids_, &used);
      target.num_prompt = static_cast<int32_t>(row.prompt_ids.size());
    }
    if (row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f ||
        row.frequency_penalty != 0.0f) {
      target.output_begin = Append(row.output_ids, host_ids, sampling_ids_, &used);
      target.num_output = static_cast<int32_t>(row.output_ids.size());
    }
    target.banned_begin = Append(row.banned_ids, host_ids, sampling_ids_, &used);
    target.num_banned = static_cast<int32_t>(row.banned_ids.size());
  }
  auto* device = sampling_memory_.as<uint8_t>();
  const int64_t bytes = count * int64_t{sizeof(DeviceSamplingRow)};
  SLUICE_CUDA_CHECK(
      cudaMemcpyAsync(device + rows_at, host_rows, bytes, cudaMemcpyHostToDevice, context_.stream));
  if (used > 0) {
    SLUICE_CUDA_CHECK(cudaMemcpyAsync(device + ids_at, host_ids, used * sizeof(uint32_t),
                                      cudaMemcpyHostToDevice, context_.stream));
  }
  SampleArgs args;
  args.logits = static_cast<const float*>(logits.data);
  args.stride = logits.stride;
  args.vocab = static_cast<int32_t>(logits.cols);
  args.rows = reinterpret_cast<const DeviceSamplingRow*>(device + rows_at);
  args.num_rows = static_cast<int32_t>(count);
  args.ids = reinterpret_cast<uint32_t*>(device + ids_at);
  args.out = reinterpret_cast<DeviceSampledToken*>(device);
  args.scratch = sampling_scratch_.data();
  if (argmax) {
    ArgmaxRows(context_, args);
  } else {
    SampleRows(context_, args);
  }
  SLUICE_CUDA_CHECK(cudaMemcpyAsync(sampling_host_.data(), device,
                                    count * sizeof(DeviceSampledToken), cudaMemcpyDeviceToHost,
                                    context_.stream));
  SLUICE_CUDA_CHECK(cudaStreamSynchronize(context_.stream));
  const auto* results = sampling_host_.as<DeviceSampledToken>();
  for (int64_t i = 0; i < count; ++i) FromDevice(results[i], rows[i].num_logprobs >= 0, out[i]);
}

void CudaBackend::Sample(TensorView logits, absl::Span<const SamplingRow> rows,
                         absl::Span<SampledToken> out) {
  if (!rows.empty()) RunSampling(logits, rows, /*forced_id=*/-1, out);
}

SampledToken CudaBackend::Score(TensorView logits, int64_t row, uint32_t id, int32_t count) {
  SamplingRow request;
  request.row = row;
  request.num_logprobs = std::max(count, 0);
  SampledToken token;
  RunSampling(logits, absl::MakeConstSpan(&request, 1), static_cast<int32_t>(id),
              absl::MakeSpan(&token, 1));
  return token;
}

void CudaBackend::CopyToHost(TensorView source, void* host) {
  const size_t bytes = static_cast<size_t>(source.cols) * SizeOf(source.dtype);
  const size_t pitch = static_cast<size_t>(source.stride) * SizeOf(source.dtype);
  if (source.rows == 0) return;
  SLUICE_CUDA_CHECK(cudaMemcpy2DAsync(host, bytes, source.data, pitch, bytes,
                                      static_cast<size_t>(source.rows), cudaMemcpyDeviceToHost,
                                      context_.stream));
  SLUICE_CUDA_CHECK(cudaStreamSynchronize(context_.stream));
}

void CudaBackend::CopyFromHost(const void* host, TensorView target) {
  const size_t bytes = static_cast<size_t>(target.cols) * SizeOf(target.dtype);
  const size_t pitch = static_cast<size_t>(target.stride) * SizeOf(target.dtype);
  if (target.rows == 0) return;
  SLUICE_CUDA_CHECK(cudaMemcpy2DAsync(target.data, pitch, host, bytes, bytes,
                                      static_cast<size_t>(target.rows), cudaMemcpyHostToDevice,
                                      context_.stream));
  SLUICE_CUDA_CHECK(cudaStreamSynchronize(context_.stream));
}

}  // namespace sluice
