// From a row of logits to a token id (kernels/sampling.h says how). Scalar and exact in its order:
// a function of the row and the request alone.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/sampling.h"

namespace sluice {

// Philox 4x32 with 10 rounds (Salmon et al., 2011): four random words of a counter and a key.
std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

// The draw of a row, uniform in [0, 1) with 53 bits: key = seed (low, high word), counter =
// (token_index, choice, 0, 0); the bits are word 0 << 32 | word 1, the highest 53 of them.
double UniformDraw(uint64_t seed, uint32_t choice, uint32_t token_index);

// Memory of one thread that samples.
class SamplingScratch {
 public:
  struct Candidate {
    float logit;
    uint32_t id;
  };

  // Makes room for a vocabulary; a larger one grows it.
  void Reserve(int64_t vocab);

  std::vector<float> logits;          // After penalties and temperature; then probabilities
  std::vector<uint32_t> counts;       // Of each id among the outputs; all 0 between rows
  std::vector<Candidate> candidates;  // The highest logits
};

// Never fails: a row with a logit that is NaN or +infinite gives finite = false; so does one in
// which all are -infinite.
SampledToken SampleRow(absl::Span<const float> logits, const SamplingRow& row,
                       SamplingScratch& scratch);

// Log-probability of `id`, and of the `count` highest.
SampledToken ScoreRow(absl::Span<const float> logits, uint32_t id, int32_t count,
                      SamplingScratch& scratch);

}  // namespace sluice
