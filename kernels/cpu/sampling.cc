#include "kernels/cpu/sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/core/check.h"

namespace sluice {
namespace {

using Candidate = SamplingScratch::Candidate;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Higher logit first, ties to the lowest id.
bool Before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

bool AllFinite(absl::Span<const float> logits) {
  constexpr uint32_t kExponent = 0x7f800000u;
  uint32_t broken = 0;
  for (const float logit : logits) {
    uint32_t bits;
    std::memcpy(&bits, &logit, sizeof(bits));
    broken |= static_cast<uint32_t>((bits & kExponent) == kExponent);
  }
  return broken == 0;
}

// Independent lanes, so that the compiler can use vectors.
float Max(absl::Span<const float> values) {
  constexpr size_t kWidth = 16;
  float lanes[kWidth];
  std::fill_n(lanes, kWidth, kLowest);
  size_t i = 0;
  for (; i + kWidth <= values.size(); i += kWidth) {
    for (size_t j = 0; j < kWidth; ++j)
      lanes[j] = values[i + j] > lanes[j] ? values[i + j] : lanes[j];
  }
  for (; i < values.size(); ++i) lanes[0] = std::max(lanes[0], values[i]);
  return *std::max_element(lanes, lanes + kWidth);
}

// The `count` highest of values, highest first; fewer when fewer are above -infinity.
void SelectTop(absl::Span<const float> values, size_t count, std::vector<Candidate>& top) {
  top.clear();
  if (count == 0) return;
  for (size_t i = 0; i < values.size(); ++i) {
    const Candidate candidate = {values[i], static_cast<uint32_t>(i)};
    if (candidate.logit == kLowest) continue;
    if (top.size() == count) {
      if (!Before(candidate, top.front())) continue;
      std::pop_heap(top.begin(), top.end(), Before);  // The heap's front is the last in order
      top.pop_back();
    }
    top.push_back(candidate);
    std::push_heap(top.begin(), top.end(), Before);
  }
  std::sort_heap(top.begin(), top.end(), Before);
}

bool HasPenalties(const SamplingRow& row) {
  return row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f ||
         row.frequency_penalty != 0.0f;
}

// Applies repetition, presence and frequency penalties, each once per distinct id.
void Penalize(const SamplingRow& row, std::vector<float>& logits, std::vector<uint32_t>& counts) {
  const auto repeat = [&](float& logit) {
    logit = logit > 0.0f ? logit / row.repetition_penalty : logit * row.repetition_penalty;
  };
  constexpr uint32_t kPromptOnly = 0x80000000u;
  for (const uint32_t id : row.output_ids) {
    if (id < logits.size()) ++counts[id];
  }
  for (const uint32_t id : row.prompt_ids) {
    if (id >= logits.size() || counts[id] != 0) continue;
    counts[id] = kPromptOnly;
    repeat(logits[id]);
  }
  for (const uint32_t id : row.output_ids) {
    if (id >= logits.size() || counts[id] == 0) continue;
    repeat(logits[id]);
    logits[id] -= row.presence_penalty;
    logits[id] -= row.frequency_penalty * static_cast<float>(counts[id]);
    counts[id] = 0;
  }
  for (const uint32_t id : row.prompt_ids) {
    if (id < logits.size()) counts[id] = 0;
  }
}

// The last candidate in order that top_k and top_p keep; {-infinity, max id} when they keep all.
// `highest` is the highest value.
Candidate LastKept(const SamplingRow& row, absl::Span<const float> values, float highest,
                   std::vector<Candidate>& top) {
  Candidate last = {kLowest, std::numeric_limits<uint32_t>::max()};
  const auto weight = [&](float value) { return std::exp((value - highest) / row.temperature); };
  const bool limited = row.top_k > 0 && static_cast<size_t>(row.top_k) < values.size();
  if (limited) {
    SelectTop(values, row.top_k, top);
    last = top.back();
  }
  if (row.top_p >= 1.0f) return last;
  double total = 0;
  if (limited) {
    for (const Candidate& candidate : top) total += weight(candidate.logit);
  } else {
    for (const float value : values) total += weight(value);
  }
  const double wanted = static_cast<double>(row.top_p) * total;
  // Most of the mass lies in few tokens: look among 64, then more.
  for (size_t count = 64;; count *= 8) {
    if (!limited) SelectTop(values, count, top);
    double sum = 0;
    for (const Candidate& candidate : top) {
      sum += weight(candidate.logit);
      if (sum >= wanted) return candidate;
    }
    if (limited || top.size() < count) return last;  // Rounding left the sum a bit below
  }
}

// Draws among the kept values in the order of ids. Turns `values` into weights.
uint32_t Draw(const SamplingRow& row, SamplingScratch& scratch, float highest) {
  std::vector<float>& values = scratch.logits;
  const Candidate last = LastKept(row, values, highest, scratch.candidates);
  double total = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const bool kept = !Before(last, {values[i], static_cast<uint32_t>(i)});
    const float weight = std::exp((values[i] - highest) / row.temperature);
    values[i] = kept && weight >= row.min_p ? weight : 0.0f;
    total += values[i];
  }
  const double target = UniformDraw(row.seed, row.choice, row.token_index) * total;
  double sum = 0;
  uint32_t drawn = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] == 0.0f) continue;
    drawn = static_cast<uint32_t>(i);
    sum += values[i];
    if (sum > target) break;
  }
  return drawn;
}

float LogSumExp(absl::Span<const float> logits) {
  const float max = Max(logits);
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - max);
  return max + static_cast<float>(std::log(sum));
}

void FillLogprobs(absl::Span<const float> logits, int32_t count, std::vector<Candidate>& top,
                  SampledToken& token) {
  const float log_sum = LogSumExp(logits);
  token.logprob = logits[token.token_id] - log_sum;
  SelectTop(logits, std::max(count, 0), top);
  for (const Candidate& candidate : top)
    token.top.push_back({candidate.id, candidate.logit - log_sum});
}

uint32_t FirstOf(absl::Span<const float> values, float value) {
  return static_cast<uint32_t>(std::find(values.begin(), values.end(), value) - values.begin());
}

}  // namespace

std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  constexpr uint64_t kMultiply0 = 0xD2511F53u;
  constexpr uint64_t kMultiply1 = 0xCD9E8D57u;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = kMultiply0 * counter[0];
    const uint64_t b = kMultiply1 * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

double UniformDraw(uint64_t seed, uint32_t choice, uint32_t token_index) {
  const std::array<uint32_t, 2> key = {static_cast<uint32_t>(seed),
                                       static_cast<uint32_t>(seed >> 32)};
  const std::array<uint32_t, 4> words = Philox4x32({token_index, choice, 0, 0}, key);
  const uint64_t bits = static_cast<uint64_t>(words[0]) << 32 | words[1];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

void SamplingScratch::Reserve(int64_t vocab) {
  const auto size = static_cast<size_t>(vocab);
  if (size <= counts.size()) return;
  logits.reserve(size);
  counts.resize(size, 0);
  candidates.reserve(size);
}

SampledToken SampleRow(absl::Span<const float> logits, const SamplingRow& row,
                       SamplingScratch& scratch) {
  SampledToken token;
  token.finite = AllFinite(logits);
  if (!token.finite) return token;
  const bool greedy = row.temperature == 0.0f;
  if (greedy && !HasPenalties(row) && row.banned_ids.empty()) {
    token.token_id = FirstOf(logits, Max(logits));
  } else {
    scratch.Reserve(static_cast<int64_t>(logits.size()));
    scratch.logits.assign(logits.begin(), logits.end());
    if (HasPenalties(row)) Penalize(row, scratch.logits, scratch.counts);
    for (const uint32_t id : row.banned_ids) {
      if (id < logits.size()) scratch.logits[id] = kLowest;
    }
    const float highest = Max(scratch.logits);
    token.finite = std::isfinite(highest);  // Not when every id is banned or a penalty overflowed
    if (!token.finite) return token;
    token.token_id = greedy ? FirstOf(scratch.logits, highest) : Draw(row, scratch, highest);
  }
  if (row.num_logprobs >= 0) FillLogprobs(logits, row.num_logprobs, scratch.candidates, token);
  return token;
}

SampledToken ScoreRow(absl::Span<const float> logits, uint32_t id, int32_t count,
                      SamplingScratch& scratch) {
  SLUICE_CHECK(id < logits.size()) << "id " << id << " beyond a vocabulary of " << logits.size();
  SampledToken token;
  token.token_id = id;
  token.finite = AllFinite(logits);
  if (token.finite) FillLogprobs(logits, count, scratch.candidates, token);
  return token;
}

}  // namespace sluice
