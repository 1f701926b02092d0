// Flags that say how an answer is generated, shared by generate, chat and up --once.
#pragma once

#include <string>
#include <vector>

#include "proto/sluice/v1/generation.pb.h"
#include "services/rpc/flags.h"

namespace sluice::cli {

struct SamplingFlags {
  std::string model;
  uint32_t max_tokens = 64;
  float temperature = 0.0f;  // Greedy: the same answer each time
  float top_p = 1.0f;
  int top_k = 0;
  int64_t seed = -1;  // Below 0: a random one
  std::vector<std::string> stop;
};

void AddSamplingFlags(CLI::App& app, SamplingFlags* flags);

// Sets the sampling fields of a request; the prompt stays as it is.
void SetSampling(const SamplingFlags& flags, v1::StreamGenerateRequest* request);

}  // namespace sluice::cli
