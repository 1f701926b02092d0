// A Weights service for tests: one tensor of several small parts for each layer, with faults on
// demand.
#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "proto/sluice/internal/v1/weights.grpc.pb.h"
#include "services/rpc/crc32c.h"

namespace sluice::worker {

class FakeWeights final : public internal::v1::Weights::Service {
 public:
  static constexpr uint64_t kTensorBytes = 1000;  // kPlain float16 [1, 500]
  static constexpr uint64_t kPartBytes = 300;
  static constexpr uint32_t kParts = 4;

  // Element bytes of every tensor.
  static std::string Bytes(uint32_t layer) {
    return std::string(kTensorBytes, static_cast<char>('a' + layer));
  }

  std::atomic<int> break_after{
      -1};  // Ends each stream with UNAVAILABLE after so many parts; -1: never
  std::atomic<int> damage_part{-1};      // Damages the n-th part sent, once
  std::atomic<bool> wrong_bytes{false};  // TensorSpec.bytes is off by one
  std::atomic<bool> hang{false};         // Sends one part, then nothing until cancelled
  std::atomic<bool> fail{false};         // FAILED_PRECONDITION at once
  std::atomic<int> parts_sent{0};

  std::vector<internal::v1::FetchRequest> requests() {
    std::lock_guard<std::mutex> lock(mutex_);
    return requests_;
  }

 private:
  grpc::Status PlanShards(grpc::ServerContext*, const internal::v1::PlanShardsRequest*,
                          internal::v1::PlanShardsResponse* response) override {
    for (uint32_t layer = 0; layer < 10; ++layer) {
      *response->add_tensors() = Spec(layer);
    }
    return grpc::Status::OK;
  }

  grpc::Status Fetch(grpc::ServerContext* context, const internal::v1::FetchRequest* request,
                     grpc::ServerWriter<internal::v1::FetchResponse>* writer) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      requests_.push_back(*request);
    }
    if (fail) {
      return {grpc::StatusCode::FAILED_PRECONDITION, "another digest"};
    }
    bool skipping = !request->resume_name().empty();
    int sent = 0;
    for (uint32_t layer = request->layers().begin(); layer < request->layers().end(); ++layer) {
      const bool here = skipping && request->resume_name() == Spec(layer).name();
      if (skipping && !here) {
        continue;
      }
      const uint32_t begin = here ? request->resume_part() : 0;
      skipping = false;
      for (uint32_t part = begin; part < kParts; ++part) {
        if (break_after >= 0 && sent >= break_after) {
          return {grpc::StatusCode::UNAVAILABLE, "broken on purpose"};
        }
        writer->Write(Part(layer, part, /*with_spec=*/part == begin));
        ++sent;
        while (hang && !context->IsCancelled()) {
          std::this_thread::sleep_for(std::chrono::milliseconds(5));
        }
      }
    }
    return grpc::Status::OK;
  }

  internal::v1::TensorSpec Spec(uint32_t layer) const {
    internal::v1::TensorSpec spec;
    spec.set_name("layers." + std::to_string(layer) + ".weight");
    spec.set_plain_dtype(1);  // float16
    spec.set_n(1);
    spec.set_k(kTensorBytes / 2);
    spec.set_bytes(kTensorBytes + (wrong_bytes ? 1 : 0));
    return spec;
  }

  internal::v1::FetchResponse Part(uint32_t layer, uint32_t part, bool with_spec) {
    internal::v1::FetchResponse response;
    if (with_spec) {
      *response.mutable_spec() = Spec(layer);
    }
    response.set_name(Spec(layer).name());
    response.set_part(part);
    response.set_offset(part * kPartBytes);
    response.set_data(Bytes(layer).substr(part * kPartBytes, kPartBytes));
    response.set_crc32c(rpc::Crc32c(response.data().data(), response.data().size()));
    response.set_last(part + 1 == kParts);
    if (parts_sent++ == damage_part) {
      (*response.mutable_data())[5] ^= 4;
    }
    return response;
  }

  std::mutex mutex_;
  std::vector<internal::v1::FetchRequest> requests_;
};

}  // namespace sluice::worker
