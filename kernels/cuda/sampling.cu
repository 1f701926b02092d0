// SampleRows: a team of blocks a row. For few rows on Hopper a cluster, each block with its part of
// the logits in shared memory; else one block, with the logits there if they fit, or in the scratch.
#include "kernels/cuda/sampling.h"

#include "kernels/core/check.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/sampling_crossing.cuh"

namespace sluice {
namespace {

// --- Log-probabilities of the raw logits -------------------------------------------------------

// The log of the sum, which the caller subtracts; writes the top ones.
template <int kTeam>
__device__ float WriteTop(Row<kTeam>& row, uint64_t best, DeviceSampledToken& out) {
  const Weighting weighting(LogitOf(best), 1.0f);
  uint64_t units = 0;
  ForValues(row.values, row.first, row.last,
            [&](int, float value) { units += weighting.Units(value); });
  const double sum = static_cast<double>(row.Sum(units)) / kUnit;
  const float log_sum = weighting.highest() + static_cast<float>(log(sum));
  const int wanted = min(row.row.num_logprobs, kMaxTopLogprobs);
  if (wanted == 0) return log_sum;
  const uint64_t last = Crossing<kTeam, /*kCount=*/true>(row, weighting, 0).Find(wanted);
  Shared& shared = row.shared;
  row.Sync();
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  ForValues(row.values, row.first, row.last, [&](int id, float value) {
    const uint64_t key = KeyOf(value, id);
    if (key >= last) shared.list[atomicAdd(&shared.count, 1)] = key;
  });
  row.Sync();
  const uint32_t count = CollectLists(row);
  if (row.rank == 0 && threadIdx.x < count) {
    const uint64_t key = shared.all_keys[threadIdx.x];
    int rank = 0;
    for (uint32_t j = 0; j < count; ++j) rank += shared.all_keys[j] > key ? 1 : 0;
    out.top_ids[rank] = IdOf(key);
    out.top_logprobs[rank] = LogitOf(key) - log_sum;
  }
  if (row.rank == 0 && threadIdx.x == 0) out.num_top = count;
  return log_sum;
}

// --- Penalties ---------------------------------------------------------------------------------

__device__ bool HasPenalties(const DeviceSamplingRow& row) {
  return row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f ||
         row.frequency_penalty != 0.0f;
}

// Each penalty once per distinct id; each block does its own ids. counts: of the vocabulary, all
// zero, before and after.
template <int kTeam>
__device__ void Penalize(const Row<kTeam>& row, uint32_t* counts) {
  constexpr uint32_t kPromptOnly = 0x80000000u;
  const DeviceSamplingRow& r = row.row;
  const auto for_ids = [&](int begin, int num, const auto& function) {
    for (int i = threadIdx.x; i < num; i += kThreads) {
      const uint32_t id = row.args.ids[begin + i];
      if (row.IsMine(id)) function(id);
    }
    __syncthreads();
  };
  const auto repeated = [&](float logit) {
    return logit > 0.0f ? __fdiv_rn(logit, r.repetition_penalty)
                        : __fmul_rn(logit, r.repetition_penalty);
  };
  __syncthreads();
  for_ids(r.output_begin, r.num_output, [&](uint32_t id) { atomicAdd(&counts[id], 1); });
  for_ids(r.prompt_begin, r.num_prompt, [&](uint32_t id) {
    if (atomicCAS(&counts[id], 0, kPromptOnly) == 0) row.Value(id) = repeated(row.Value(id));
  });
  for_ids(r.output_begin, r.num_output, [&](uint32_t id) {
    const uint32_t count = atomicExch(&counts[id], 0);
    if (count == 0) return;
    const float logit = __fsub_rn(repeated(row.Value(id)), r.presence_penalty);
    row.Value(id) = __fsub_rn(logit, __fmul_rn(r.frequency_penalty, static_cast<float>(count)));
  });
  for_ids(r.prompt_begin, r.num_prompt, [&](uint32_t id) { counts[id] = 0; });
}

// --- The draw ----------------------------------------------------------------------------------

// Uniform in [0, 1) with 53 bits: Philox 4x32-10 as in kernels/cpu/sampling.h.
__device__ double UniformDraw(const DeviceSamplingRow& row) {
  uint32_t c0 = row.token_index, c1 = row.choice, c2 = 0, c3 = 0;
  auto k0 = static_cast<uint32_t>(row.seed);
  auto k1 = static_cast<uint32_t>(row.seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint64_t bits = static_cast<uint64_t>(c0) << 32 | c1;
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

// The key of the last candidate in order that top_k and top_p keep; 0 when they keep all.
template <int kTeam>
__device__ uint64_t LastKept(Row<kTeam>& row, const Weighting& weighting) {
  const DeviceSamplingRow& r = row.row;
  uint64_t last = 0;
  if (r.top_k > 0 && r.top_k < row.args.vocab) {
    last = Crossing<kTeam, /*kCount=*/true>(row, weighting, 0).Find(r.top_k);
  }
  if (r.top_p >= 1.0f) return last;
  uint64_t units = 0;
  ForValues(row.values, row.first, row.last, [&](int id, float value) {
    if (KeyOf(value, id) >= last) units += weighting.Units(value);
  });
  const auto total = static_cast<double>(row.Sum(units));
  const auto wanted = static_cast<uint64_t>(ceil(static_cast<double>(r.top_p) * total));
  const uint64_t crossing =
      Crossing<kTeam, /*kCount=*/false>(row, weighting, last).Find(wanted > 0 ? wanted : 1);
  return crossing == 0 ? last : crossing;
}

template <int kTeam>
__device__ uint32_t Draw(Row<kTeam>& row, float highest) {
  const Weighting weighting(highest, row.row.temperature);
  const uint64_t last = LastKept(row, weighting);
  const float min_p = row.row.min_p;
  const auto units = [&](int id) -> uint64_t {
    const float value = row.Value(id);
    if (KeyOf(value, id) < last) return 0;
    const float weight = weighting(value);
    return weight >= min_p ? __float2ull_rn(weight * kUnit) : 0;
  };
  const auto target = [&](uint64_t total) {
    const auto drawn = static_cast<uint64_t>(UniformDraw(row.row) * static_cast<double>(total));
    return drawn < total ? drawn : total - 1;
  };
  return Locate(row, units, target);
}

// --- The kernel --------------------------------------------------------------------------------

// Copies the block's part of a row of logits to row.values and gives the row's highest key, or
// kBrokenKey.
template <int kTeam>
__device__ uint64_t LoadRow(Row<kTeam>& row, const float* logits) {
  uint64_t best = 0;
  ForValues(logits + row.first, row.first, row.last, [&](int id, float value) {
    row.Value(id) = value;
    const uint64_t key = IsFinite(value) ? KeyOf(value, id) : kBrokenKey;
    best = key > best ? key : best;
  });
  return row.Max(best);
}

// Penalties and bans; gives the highest key after them.
template <int kTeam>
__device__ uint64_t Reshape(Row<kTeam>& row, uint64_t best, uint32_t* counts) {
  const DeviceSamplingRow& r = row.row;
  const bool penalties = HasPenalties(r);
  if (!penalties && r.num_banned == 0) return best;
  if (penalties) Penalize(row, counts);
  for (int i = threadIdx.x; i < r.num_banned; i += kThreads) {
    const uint32_t id = row.args.ids[r.banned_begin + i];
    if (row.IsMine(id)) row.Value(id) = -INFINITY;
  }
  __syncthreads();
  best = 0;
  ForValues(row.values, row.first, row.last, [&](int id, float value) {
    const uint64_t key = KeyOf(value, id);
    best = key > best ? key : best;
  });
  return row.Max(best);
}

// Ids of each block of a team: whole warps.
__host__ __device__ inline int IdsPerBlock(int vocab, int team) {
  return (vocab + 32 * team - 1) / (32 * team) * 32;
}

template <int kTeam>
__device__ __forceinline__ void SampleRow(const SampleArgs& args, bool in_shared) {
  extern __shared__ __align__(16) uint8_t dynamic[];
  LetNextStart();
  WaitForPrevious();
  const int64_t index = blockIdx.x / kTeam;
  const int rank = static_cast<int>(blockIdx.x) % kTeam;
  const int per_block = IdsPerBlock(args.vocab, kTeam);
  const int first = min(args.vocab, rank * per_block);
  const SamplingScratchView scratch(args.scratch, args.num_rows, args.vocab);
  const DeviceSamplingRow r = args.rows[index];
  float* values = in_shared ? reinterpret_cast<float*>(dynamic + sizeof(Shared))
                            : scratch.values + index * args.vocab;
  Row<kTeam> row = {args,
                    r,
                    values,
                    first,
                    min(args.vocab, first + per_block),
                    rank,
                    *reinterpret_cast<Shared*>(dynamic)};
  const float* logits = args.logits + r.row * args.stride;
  DeviceSampledToken& out = args.out[index];
  const bool writes = rank == 0 && threadIdx.x == 0;
  if (writes) out.num_top = 0;
  row.Sync();  // The other blocks have begun

  uint64_t best = LoadRow(row, logits);
  bool finite = best != kBrokenKey;
  float log_sum = 0.0f;
  if (finite && r.num_logprobs >= 0) log_sum = WriteTop(row, best, out);
  uint32_t token = 0;
  if (finite && r.forced_id >= 0) {
    token = r.forced_id;
  } else if (finite) {
    best = Reshape(row, best, scratch.counts + index * args.vocab);
    finite = IsFinite(LogitOf(best));  // Not when every id is banned or a penalty overflowed
    if (finite) token = r.temperature == 0.0f ? IdOf(best) : Draw(row, LogitOf(best));
  }
  if (writes) {
    WriteToken(args, r, index, token, finite);
    if (finite && r.num_logprobs >= 0) out.logprob = logits[token] - log_sum;
  }
  row.Sync();  // Nobody reads this block's shared memory any more
}

__global__ void __launch_bounds__(kThreads) SampleKernel(const SampleArgs args, bool in_shared) {
  SampleRow<1>(args, in_shared);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SLUICE_CLUSTER __cluster_dims__(kLargestTeam, 1, 1)
#else
#define SLUICE_CLUSTER  // Never launched there
#endif
__global__ void SLUICE_CLUSTER __launch_bounds__(kThreads)
    SampleClusterKernel(const SampleArgs args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  SampleRow<kLargestTeam>(args, /*in_shared=*/true);
#endif
}
#undef SLUICE_CLUSTER

// Whether the cluster kernel that this card runs is the real one: a later card for which only PTX
// of sm_80 is there gets the empty one.
bool HasClusterKernel() {
  static const bool has = [] {
    cudaFuncAttributes attributes;
    SLUICE_CUDA_CHECK(cudaFuncGetAttributes(&attributes, SampleClusterKernel));
    return attributes.ptxVersion >= 90;
  }();
  return has;
}

void AllowShared(const void* kernel, size_t bytes) {
  SLUICE_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(bytes)));
}

}  // namespace

int64_t SamplingScratchBytes(int64_t max_rows, int64_t vocab) {
  return max_rows * (16 + 2 * static_cast<int64_t>(sizeof(float)) * vocab);
}

void SampleRows(const LaunchContext& context, const SampleArgs& args) {
  if (args.num_rows == 0) return;
  SLUICE_CHECK(args.vocab > 0 && args.vocab <= 1 << 18) << "vocabulary of " << args.vocab;
  const size_t limit = static_cast<size_t>(context.max_shared_bytes);
  // Clusters where a row has work for eight blocks, and for as many rows as surely run at once:
  // a cluster needs eight free multiprocessors of one group, so half of all are counted on.
  const bool in_clusters = context.dependent_launch && args.vocab >= 3 * kThreads * kLargestTeam &&
                           2 * args.num_rows * kLargestTeam <= context.num_sms &&
                           HasClusterKernel();
  const int ids = IdsPerBlock(args.vocab, in_clusters ? kLargestTeam : 1);
  const size_t with_values = sizeof(Shared) + static_cast<size_t>(ids) * sizeof(float);
  if (in_clusters && with_values <= limit) {
    AllowShared(reinterpret_cast<const void*>(SampleClusterKernel), with_values);
    Launch(context, SampleClusterKernel, dim3(args.num_rows * kLargestTeam), dim3(kThreads),
           with_values, args);
    return;
  }
  const bool in_shared = !in_clusters && with_values <= limit;
  const size_t bytes = in_shared ? with_values : sizeof(Shared);
  AllowShared(reinterpret_cast<const void*>(SampleKernel), bytes);
  Launch(context, SampleKernel, dim3(args.num_rows), dim3(kThreads), bytes, args, in_shared);
}

}  // namespace sluice
