// The models of the engine written once more, as plainly as they go: float64, the whole sequence at
// a time, no cache, no stacking, weights by name. Shares no code with worker/engine.
#pragma once

#include <cstdint>
#include <vector>

#include "tests/worker/engine/small_model.h"

namespace sluice::worker {

// Logits [ids.size(), vocab_size] of every position. The first prompt_len ids are the prompt
// (dynamic scaling turns all of them by the prompt's length and every later one by its own).
std::vector<std::vector<double>> ReferenceLogits(const SmallModel& model,
                                                 const std::vector<uint32_t>& ids,
                                                 uint32_t prompt_len);

// log(softmax(logits))[id].
double ReferenceLogprob(const std::vector<double>& logits, uint32_t id);

}  // namespace sluice::worker
