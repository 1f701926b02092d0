#include "services/cli/sampling_flags.h"

namespace sluice::cli {

void AddSamplingFlags(CLI::App& app, SamplingFlags* flags) {
  rpc::AddFlag(app, "max-tokens", &flags->max_tokens, "Most tokens to generate");
  rpc::AddFlag(app, "temperature", &flags->temperature, "0 is greedy")
      ->check(CLI::Range(0.0, 100.0));
  rpc::AddFlag(app, "top-p", &flags->top_p, "Keep tokens that together have this probability");
  rpc::AddFlag(app, "top-k", &flags->top_k, "Keep this many tokens; 0: all");
  rpc::AddFlag(app, "seed", &flags->seed, "Key of the random numbers; below 0: a random one");
  app.add_option("--stop", flags->stop, "A string that ends the answer; may be repeated");
}

void SetSampling(const SamplingFlags& flags, v1::StreamGenerateRequest* request) {
  request->set_model(flags.model);
  request->set_max_tokens(flags.max_tokens);
  request->set_temperature(flags.temperature);
  request->set_top_p(flags.top_p);
  request->set_top_k(flags.top_k);
  if (flags.seed >= 0) {
    request->set_seed(flags.seed);
  }
  request->mutable_stop()->Assign(flags.stop.begin(), flags.stop.end());
}

}  // namespace sluice::cli
