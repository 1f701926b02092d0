// Speed of the whole service as a client sees it: real processes, one gRPC stream or several.
//   service_bench MODEL WORKERS THREADS [STREAMS]
// Prints one JSON line: prefill tokens/s (prompt of 512 ids to the first token), decode tokens/s
// with that context (512-640) and with a short one (5-133), medians over rounds, and of each stage
// its step time and the share of time it computes.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <thread>

#include "tests/e2e/cluster.h"

namespace sluice::e2e {
namespace {

constexpr int kPromptTokens = 512;
constexpr int kDecodeTokens = 128;
constexpr int kRounds = 5;

double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

struct Timing {
  double first_token_seconds = 0;
  double decode_tokens_per_second = 0;
};

Timing Measure(const Cluster& cluster, int prompt_tokens) {
  const std::vector<uint32_t> pattern = {504, 3575, 282, 4649, 314};  // "The capital of France is"
  std::vector<uint32_t> prompt;
  for (int i = 0; i < prompt_tokens; ++i) prompt.push_back(pattern[i % pattern.size()]);
  auto stub = cluster.Generation();
  grpc::ClientContext context;
  const auto start = std::chrono::steady_clock::now();
  auto reader = stub->StreamGenerate(&context, GreedyRequest(prompt, kDecodeTokens + 1));
  v1::StreamGenerateResponse message;
  Timing timing;
  int tokens = 0, first_tokens = 0;
  while (reader->Read(&message)) {
    tokens += message.token_ids_size();
    if (first_tokens == 0 && tokens > 0) {
      first_tokens = tokens;
      timing.first_token_seconds = SecondsSince(start);
    }
  }
  if (!reader->Finish().ok()) std::exit(1);
  timing.decode_tokens_per_second =
      (tokens - first_tokens) / (SecondsSince(start) - timing.first_token_seconds);
  return timing;
}

nlohmann::json Stages(const Cluster& cluster) {
  grpc::ClientContext context;
  v1::GetClusterResponse response;
  cluster.Admin()->GetCluster(&context, {}, &response);
  nlohmann::json stages = nlohmann::json::array();
  for (const v1::Worker& worker : response.workers()) {
    stages.push_back({{"worker", worker.worker_id()},
                      {"step_us_p50", worker.step_us_p50()},
                      {"busy", worker.busy()},
                      {"resident_mib", worker.resident_bytes() >> 20}});
  }
  return stages;
}

// Tokens/s of `streams` concurrent requests of short prompts, all together; stages are sampled in
// the middle.
double Throughput(const Cluster& cluster, int streams, nlohmann::json* stages) {
  std::vector<std::thread> clients;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < streams; ++i) {
    clients.emplace_back([&] {
      for (int round = 0; round < 3; ++round) Measure(cluster, 16);
    });
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(2500));
  *stages = Stages(cluster);
  for (std::thread& client : clients) client.join();
  return streams * 3 * (kDecodeTokens + 1) / SecondsSince(start);
}

int Run(const std::string& model, int workers, int threads, int streams) {
  Cluster cluster({.model = model, .workers = workers, .threads = threads});
  if (!cluster.WaitReady()) {
    std::fprintf(stderr, "%s\n", cluster.Logs().c_str());
    return 1;
  }
  Measure(cluster, kPromptTokens);  // Warm-up
  std::vector<double> prefill, decode_long, decode_short;
  for (int i = 0; i < kRounds; ++i) {
    const Timing timing = Measure(cluster, kPromptTokens);
    prefill.push_back(kPromptTokens / timing.first_token_seconds);
    decode_long.push_back(timing.decode_tokens_per_second);
    decode_short.push_back(Measure(cluster, 5).decode_tokens_per_second);
  }
  nlohmann::json line = {{"what", "sluice"},
                         {"workers", workers},
                         {"threads", threads},
                         {"prefill_512", Median(prefill)},
                         {"decode_512_640", Median(decode_long)},
                         {"decode_5_133", Median(decode_short)}};
  if (streams > 1) {
    nlohmann::json stages;
    line["streams"] = streams;
    line["throughput"] = Throughput(cluster, streams, &stages);
    line["stages"] = stages;
  }
  std::printf("%s\n", line.dump().c_str());
  return 0;
}

}  // namespace
}  // namespace sluice::e2e

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: service_bench MODEL WORKERS THREADS [STREAMS]\n");
    return 2;
  }
  return sluice::e2e::Run(argv[1], std::atoi(argv[2]), std::atoi(argv[3]),
                          argc > 4 ? std::atoi(argv[4]) : 1);
}
