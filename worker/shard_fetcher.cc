#include "worker/shard_fetcher.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/core/fault_point.h"
#include "proto/sluice/internal/v1/weights.grpc.pb.h"
#include "services/rpc/channel.h"
#include "services/rpc/grpc_status.h"
#include "services/rpc/log.h"
#include "worker/tensor_assembler.h"

namespace sluice::worker {
namespace {

using internal::v1::FetchRequest;
using internal::v1::FetchResponse;
using internal::v1::ShardAssignment;

constexpr int kMaxTries = 10;  // Without a new part

// True for canonical names that the assignment asks for.
bool IsWanted(const ShardAssignment& assignment, const std::string& name) {
  if (absl::StartsWith(name, "layers.")) {
    const unsigned long layer = std::strtoul(name.c_str() + 7, nullptr, 10);
    return layer >= assignment.layers().begin() && layer < assignment.layers().end();
  }
  const bool is_embedding =
      absl::StartsWith(name, "embed_") || absl::StartsWith(name, "project_in");
  return is_embedding ? assignment.has_embedding() : assignment.has_head();
}

// Bytes of the shard by the loader's description; 0 when it cannot be had. Only a progress bar
// depends on it.
uint64_t TotalBytes(const ShardAssignment& assignment, internal::v1::Weights::Stub* stub,
                    Cancellation* cancellation) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
  Cancellation::Scope scope(cancellation, [&] { context.TryCancel(); });
  internal::v1::PlanShardsResponse description;
  if (!stub->PlanShards(&context, internal::v1::PlanShardsRequest(), &description).ok()) {
    return 0;
  }
  uint64_t total = 0;
  for (const auto& tensor : description.tensors()) {
    total += IsWanted(assignment, tensor.name()) ? tensor.bytes() : 0;
  }
  return total;
}

FetchRequest RequestFor(const ShardAssignment& assignment, const TensorAssembler& assembler) {
  FetchRequest request;
  request.set_model_digest(assignment.model_digest());
  *request.mutable_layers() = assignment.layers();
  request.set_embedding(assignment.has_embedding());
  request.set_head(assignment.has_head());
  if (!assembler.resume_name().empty()) {
    request.set_resume_name(assembler.resume_name());
    request.set_resume_part(assembler.resume_part());
  }
  return request;
}

// One stream, from the resume point to its end or error.
absl::Status FetchOnce(const ShardAssignment& assignment, internal::v1::Weights::Stub* stub,
                       TensorAssembler* assembler, Cancellation* cancellation,
                       const std::function<void()>& on_part) {
  grpc::ClientContext context;
  Cancellation::Scope scope(cancellation, [&] { context.TryCancel(); });
  auto reader = stub->Fetch(&context, RequestFor(assignment, *assembler));
  FetchResponse part;
  absl::Status status = absl::OkStatus();
  while (status.ok() && reader->Read(&part)) {
    SLUICE_FAULT_POINT("worker.fetch_part");
    status = assembler->Add(part);
    on_part();
  }
  if (!status.ok()) {
    context.TryCancel();
    reader->Finish();
    return status;
  }
  status = rpc::FromGrpcStatus(reader->Finish());
  return status.ok() ? assembler->Finish() : status;
}

bool MayRetry(const absl::Status& status) {
  return status.code() == absl::StatusCode::kUnavailable ||
         status.code() == absl::StatusCode::kDataLoss ||
         status.code() == absl::StatusCode::kCancelled ||
         status.code() == absl::StatusCode::kUnknown ||
         status.code() == absl::StatusCode::kInternal;
}

}  // namespace

absl::Status FetchShard(const ShardAssignment& assignment, const FetchOptions& options,
                        StageEngine::Loader* loader, Cancellation* cancellation) {
  auto stub = internal::v1::Weights::NewStub(
      rpc::MakeChannel(assignment.loader_address(), rpc::ChannelKind::kLink));
  const uint64_t total = TotalBytes(assignment, stub.get(), cancellation);
  // An error of ours must not be mistaken for one of the stream, whatever its code.
  absl::Status add_error = absl::OkStatus();
  TensorAssembler assembler(options.max_tensor_bytes,
                            [&](const std::string& name, QuantizedMatrix tensor) {
                              add_error = loader->Add(name, std::move(tensor));
                              return add_error;
                            });
  int tries = 0;
  while (true) {
    const uint64_t before = assembler.bytes_done();
    const absl::Status status = FetchOnce(assignment, stub.get(), &assembler, cancellation, [&] {
      if (options.on_progress) {
        options.on_progress(assembler.bytes_done(), total);
      }
    });
    if (status.ok() || !add_error.ok() || !MayRetry(status)) {
      return status;
    }
    tries = assembler.bytes_done() > before ? 1 : tries + 1;
    if (tries >= kMaxTries) {
      return absl::Status(status.code(), absl::StrCat("loader ", assignment.loader_address(), ": ",
                                                      std::string(status.message())));
    }
    rpc::LogWarning("fetch_resumed", {{"error", status},
                                      {"tensor", assembler.resume_name()},
                                      {"part", assembler.resume_part()}});
    if (cancellation->WaitFor(std::chrono::milliseconds(std::min(100 << tries, 2000)))) {
      return absl::CancelledError("loading was cancelled");
    }
  }
}

}  // namespace sluice::worker
