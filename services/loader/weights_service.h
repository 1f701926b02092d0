// WeightsService: the gRPC shell of Weights around one checkpoint. Each Fetch and FetchFile has a
// thread of its own, which waits for the disk, the budget and the client; the callbacks only wake
// it. A client that takes nothing for 60 s is cut off.
#pragma once

#include <atomic>

#include "proto/sluice/internal/v1/weights.grpc.pb.h"
#include "services/checkpoint/checkpoint.h"
#include "services/loader/loader_metrics.h"
#include "services/loader/memory_budget.h"

namespace sluice::loader {

// Bytes that converted tensors of `checkpoint` may take, over all streams: three of the largest
// quantized one, 64 MiB at least.
uint64_t BudgetFor(const checkpoint::Checkpoint& checkpoint);

class WeightsService : public internal::v1::Weights::CallbackService {
 public:
  // `checkpoint` must outlive the service, the service its server.
  explicit WeightsService(const checkpoint::Checkpoint& checkpoint);

  grpc::ServerUnaryReactor* PlanShards(grpc::CallbackServerContext* context,
                                       const internal::v1::PlanShardsRequest* request,
                                       internal::v1::PlanShardsResponse* response) override;
  grpc::ServerWriteReactor<internal::v1::FetchResponse>* Fetch(
      grpc::CallbackServerContext* context, const internal::v1::FetchRequest* request) override;
  grpc::ServerWriteReactor<internal::v1::FetchFileResponse>* FetchFile(
      grpc::CallbackServerContext* context, const internal::v1::FetchFileRequest* request) override;

  // Adds what this service has done. Thread-safe.
  void Collect(metrics::Page* page) const;

 private:
  const checkpoint::Checkpoint& checkpoint_;
  MemoryBudget budget_;
  LoaderMetrics metrics_;
  std::atomic<int> streams_{0};
};

}  // namespace sluice::loader
