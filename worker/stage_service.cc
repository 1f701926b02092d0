#include "worker/stage_service.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "kernels/core/fault_point.h"
#include "kernels/core/status_macros.h"
#include "services/rpc/grpc_status.h"

namespace sluice::worker {

class StageService::Hold {
 public:
  Hold(StageService* service, grpc::ServerContext* context)
      : service_(service), context_(context) {}
  ~Hold() {
    std::lock_guard<std::mutex> lock(service_->mutex_);
    service_->holders_.erase(context_);
    service_->left_.notify_all();
  }

  // Joins the session of `epoch`.
  absl::Status Join(uint64_t epoch) {
    std::lock_guard<std::mutex> lock(service_->mutex_);
    SLUICE_RETURN_IF_ERROR(service_->CheckEpoch(epoch));
    session_ = service_->session_;
    joined_ = true;
    service_->holders_.insert(context_);
    return absl::OkStatus();
  }
  bool joined() const { return joined_; }
  const Session& session() const { return session_; }

 private:
  StageService* const service_;
  grpc::ServerContext* const context_;
  bool joined_ = false;
  Session session_;
};

absl::Status StageService::Promise(uint64_t epoch) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (epoch <= promised_) {
    return absl::FailedPreconditionError(absl::StrCat("ConfigureOrder.epoch: ", epoch,
                                                      " is not above ", promised_,
                                                      ", which this worker has promised"));
  }
  promised_ = epoch;
  return absl::OkStatus();
}

uint64_t StageService::promised() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return promised_;
}

void StageService::Open(const Session& session) {
  std::lock_guard<std::mutex> lock(mutex_);
  SLUICE_CHECK(!open_ && holders_.empty()) << "a session is open";
  session_ = session;
  open_ = true;
}

void StageService::Close() {
  std::unique_lock<std::mutex> lock(mutex_);
  open_ = false;
  for (grpc::ServerContext* context : holders_) {
    context->TryCancel();
  }
  left_.wait(lock, [this] { return holders_.empty(); });
}

absl::Status StageService::CheckEpoch(uint64_t epoch) const {
  if (epoch < promised_) {
    return absl::FailedPreconditionError(
        absl::StrCat("epoch ", epoch, " is below ", promised_, ", which this worker has promised"));
  }
  if (!open_ || epoch != session_.format.epoch) {
    return absl::FailedPreconditionError(
        absl::StrCat("this stage takes no steps of epoch ", epoch,
                     " now; send them after its WorkerReady and before a halt"));
  }
  return absl::OkStatus();
}

template <typename Response, typename Stream, typename Request>
absl::Status StageService::TakeSteps(grpc::ServerContext* context, Stream* stream, Request* request,
                                     bool is_link) {
  Hold hold(this, context);
  StepAssembler assembler{StepFormat()};
  while (stream->Read(request)) {
    auto* frame = request->mutable_frame();
    if (!hold.joined()) {
      if (!frame->has_header()) {
        return absl::InvalidArgumentError("StepFrame.header: the first piece of a step has none");
      }
      SLUICE_RETURN_IF_ERROR(hold.Join(frame->header().epoch()));
      if (is_link != (hold.session().stage > 0)) {
        return absl::FailedPreconditionError(
            absl::StrCat("this worker is stage ", hold.session().stage,
                         ": stage 0 takes Step from the controller, the others Link from the "
                         "stage before"));
      }
      StepFormat format = hold.session().format;
      format.has_hidden = is_link;
      assembler = StepAssembler(format);
    }
    SLUICE_ASSIGN_OR_RETURN(const bool whole, assembler.Add(frame));
    if (!whole) {
      continue;
    }
    SLUICE_FAULT_POINT("worker.step_received");
    StepWork step = assembler.Take();
    Response response;
    response.set_step(step.header.step());
    SLUICE_RETURN_IF_ERROR(hold.session().loop->Push(std::move(step)));
    assembler.Recycle(hold.session().loop->SpareBuffer());
    stream->Write(response);
  }
  return absl::OkStatus();
}

grpc::Status StageService::Step(
    grpc::ServerContext* context,
    grpc::ServerReaderWriter<internal::v1::StepResponse, internal::v1::StepRequest>* stream) {
  internal::v1::StepRequest request;
  return rpc::ToGrpcStatus(
      TakeSteps<internal::v1::StepResponse>(context, stream, &request, /*is_link=*/false));
}

grpc::Status StageService::Link(
    grpc::ServerContext* context,
    grpc::ServerReaderWriter<internal::v1::LinkResponse, internal::v1::LinkRequest>* stream) {
  internal::v1::LinkRequest request;
  return rpc::ToGrpcStatus(
      TakeSteps<internal::v1::LinkResponse>(context, stream, &request, /*is_link=*/true));
}

grpc::Status StageService::Ring(
    grpc::ServerContext* context,
    grpc::ServerReaderWriter<internal::v1::RingResponse, internal::v1::RingRequest>* stream) {
  Hold hold(this, context);
  internal::v1::RingRequest request;
  internal::v1::RingResponse response;
  while (stream->Read(&request)) {
    SLUICE_FAULT_POINT("worker.ring_received");
    const uint64_t epoch = request.frame().epoch();
    absl::Status status = absl::OkStatus();
    if (!hold.joined()) {
      status = hold.Join(epoch);
      if (status.ok() && (hold.session().stage != 0 || hold.session().stages == 1)) {
        status = absl::FailedPreconditionError("only stage 0 of several takes a ring");
      }
    } else if (epoch != hold.session().format.epoch) {
      status = absl::FailedPreconditionError("TokenFrame.epoch changed within a stream");
    }
    response.set_step(request.frame().step());
    if (status.ok()) {
      status = hold.session().loop->PushSampled(std::move(*request.mutable_frame()));
    }
    if (!status.ok()) {
      return rpc::ToGrpcStatus(status);
    }
    stream->Write(response);
  }
  return grpc::Status::OK;
}

}  // namespace sluice::worker
