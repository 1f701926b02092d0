// loader_pull ADDRESS PID [STREAMS]: pulls the whole model from the loader at ADDRESS, cut into
// STREAMS (2) ranges of layers as that many workers would, checks every part, and prints bytes,
// seconds and the peak memory (VmHWM) of process PID, the loader, beside the limit: three of the
// largest quantized tensors + 256 MiB. Exit code 1 above the limit.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "proto/sluice/internal/v1/weights.grpc.pb.h"
#include "services/rpc/channel.h"
#include "services/rpc/crc32c.h"

namespace {

namespace v1 = sluice::internal::v1;

struct Pulled {
  uint64_t bytes = 0;
  std::string error;
};

Pulled Pull(const std::string& address, const v1::FetchRequest& request) {
  auto stub =
      v1::Weights::NewStub(sluice::rpc::MakeChannel(address, sluice::rpc::ChannelKind::kLink));
  grpc::ClientContext context;
  auto reader = stub->Fetch(&context, request);
  Pulled pulled;
  v1::FetchResponse part;
  while (reader->Read(&part)) {
    pulled.bytes += part.data().size();
    if (sluice::rpc::Crc32c(part.data().data(), part.data().size()) != part.crc32c()) {
      pulled.error = "wrong CRC in " + part.name();
    }
  }
  const grpc::Status status = reader->Finish();
  if (!status.ok()) pulled.error = status.error_message();
  return pulled;
}

// KiB; 0 when it cannot be read.
uint64_t PeakKib(const std::string& pid) {
  std::ifstream status("/proc/" + pid + "/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM:", 0) == 0) return std::strtoull(line.c_str() + 6, nullptr, 10);
  }
  return 0;
}

int Report(const v1::PlanShardsResponse& plan, uint64_t bytes, double seconds, uint64_t peak_kib) {
  uint64_t largest = 0;
  for (const auto& tensor : plan.tensors()) {
    if (tensor.format() != 0) largest = std::max(largest, tensor.bytes());
  }
  const double mib = 1 << 20;
  const double limit = 3 * static_cast<double>(largest) / mib + 256;
  const double peak = static_cast<double>(peak_kib) / 1024;
  std::printf(
      "%s: %.0f MiB in %.1f s; largest quantized tensor %.1f MiB; peak %.1f MiB, limit %.1f MiB\n",
      plan.model_name().c_str(), static_cast<double>(bytes) / mib, seconds,
      static_cast<double>(largest) / mib, peak, limit);
  return peak > 0 && peak <= limit ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: loader_pull ADDRESS PID [STREAMS]\n");
    return 2;
  }
  const std::string address = argv[1];
  const uint32_t streams = argc > 3 ? std::max(1, std::atoi(argv[3])) : 2;
  auto stub =
      v1::Weights::NewStub(sluice::rpc::MakeChannel(address, sluice::rpc::ChannelKind::kControl));
  grpc::ClientContext context;
  v1::PlanShardsResponse plan;
  const grpc::Status status = stub->PlanShards(&context, v1::PlanShardsRequest(), &plan);
  if (!status.ok()) {
    std::fprintf(stderr, "PlanShards: %s\n", status.error_message().c_str());
    return 1;
  }
  const auto start = std::chrono::steady_clock::now();
  std::vector<Pulled> pulled(streams);
  std::vector<std::thread> threads;
  const uint32_t layers = plan.config().num_layers();
  for (uint32_t i = 0; i < streams; ++i) {
    v1::FetchRequest request;
    request.set_model_digest(plan.model_digest());
    request.mutable_layers()->set_begin(layers * i / streams);
    request.mutable_layers()->set_end(layers * (i + 1) / streams);
    request.set_embedding(i == 0);
    request.set_head(i + 1 == streams);
    threads.emplace_back([&pulled, &address, i, request] { pulled[i] = Pull(address, request); });
  }
  uint64_t bytes = 0;
  for (uint32_t i = 0; i < streams; ++i) {
    threads[i].join();
    bytes += pulled[i].bytes;
    if (!pulled[i].error.empty()) {
      std::fprintf(stderr, "Fetch: %s\n", pulled[i].error.c_str());
      return 1;
    }
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return Report(plan, bytes, seconds.count(), PeakKib(argv[2]));
}
