#include "worker/worker.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/fault_point.h"
#include "kernels/core/status_macros.h"
#include "services/rpc/log.h"
#include "services/rpc/process.h"
#include "worker/host_info.h"
#include "worker/shard_fetcher.h"

namespace sluice::worker {
namespace {

using internal::v1::AttachRequest;
using internal::v1::ConfigureOrder;
using internal::v1::HaltOrder;
using internal::v1::ShardAssignment;

constexpr uint32_t kProtocolVersion = 1;
constexpr size_t kMaxSocketPath = 107;
constexpr std::chrono::milliseconds kProgressInterval(200);

std::string HostOf(const WorkerOptions& options) {
  return options.advertise_host.empty() ? options.listen.substr(0, options.listen.rfind(':'))
                                        : options.advertise_host;
}

absl::Status CheckOptions(const WorkerOptions& options) {
  const std::string& id = options.worker_id;
  const bool good = !id.empty() && id.size() <= 64 && std::all_of(id.begin(), id.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
  });
  if (!good) {
    return absl::InvalidArgumentError("--worker-id \"" + id +
                                      "\": 1 to 64 of a-z 0-9 . _ - are allowed");
  }
  if (options.unix_socket.size() > kMaxSocketPath) {
    return absl::InvalidArgumentError("--unix-socket " + options.unix_socket +
                                      ": longer than 107 bytes; choose a shorter path");
  }
  if (options.listen.rfind(':') == std::string::npos) {
    return absl::InvalidArgumentError("--listen " + options.listen +
                                      ": write host:port, e.g. 127.0.0.1:0");
  }
  const std::string host = HostOf(options);
  if (host.empty() || host == "0.0.0.0" || host == "[::]" || host == "::") {
    return absl::InvalidArgumentError("--listen " + options.listen +
                                      " is no address that others can dial; name one with "
                                      "--advertise-host");
  }
  return absl::OkStatus();
}

}  // namespace

bool HoldsSameWeights(const ShardAssignment& held, const ShardAssignment& wanted) {
  return !held.model_digest().empty() && held.model_digest() == wanted.model_digest() &&
         held.layers().begin() == wanted.layers().begin() &&
         held.layers().end() == wanted.layers().end() &&
         held.has_embedding() == wanted.has_embedding() && held.has_head() == wanted.has_head();
}

Worker::Worker(const WorkerOptions& options, LoaderFactory make_loader)
    : options_(options), make_loader_(std::move(make_loader)) {}

absl::StatusOr<std::unique_ptr<Worker>> Worker::Start(const WorkerOptions& options,
                                                      LoaderFactory make_loader) {
  SLUICE_RETURN_IF_ERROR(CheckOptions(options));
  auto worker = std::unique_ptr<Worker>(new Worker(options, std::move(make_loader)));
  rpc::ServerOptions server;
  server.addresses = {options.listen};
  if (!options.unix_socket.empty()) {
    server.addresses.push_back("unix:" + options.unix_socket);
    worker->addresses_.push_back("unix:" + options.unix_socket);
  }
  SLUICE_ASSIGN_OR_RETURN(worker->server_, rpc::ServerRunner::Start(server, {&worker->service_}));
  worker->metrics_.SetMemory({}, options.memory_bytes);
  worker->addresses_.push_back(
      absl::StrCat(HostOf(options), ":", worker->server_->ports().front()));
  rpc::LogInfo("worker_listening", {{"worker_id", options.worker_id},
                                    {"address", worker->addresses_.back()},
                                    {"device", options.device_name},
                                    {"memory_bytes", options.memory_bytes}});
  worker->Attach();
  return worker;
}

Worker::~Worker() {
  Stop();
  attach_.reset();
  CloseSession();
}

void Worker::Attach() {
  AttachClient::Callbacks callbacks;
  callbacks.make_hello = [this] { return Hello(); };
  callbacks.make_stats = [this] { return Stats(); };
  callbacks.on_order = [this](internal::v1::AttachResponse order) { TakeOrder(std::move(order)); };
  callbacks.on_detached = [this](const absl::Status&) { Post(Detached{}); };
  attach_ = std::make_unique<AttachClient>(options_.controller_address, std::move(callbacks));
}

internal::v1::WorkerHello Worker::Hello() {
  internal::v1::WorkerHello hello;
  hello.set_worker_id(options_.worker_id);
  hello.set_host_id(rpc::HostId());
  hello.set_device_kind(options_.device_kind);
  hello.set_device_name(options_.device_name);
  hello.set_device_index(options_.device_index);
  hello.set_memory_bytes(options_.memory_bytes);
  *hello.mutable_addresses() = {addresses_.begin(), addresses_.end()};
  hello.set_protocol_version(kProtocolVersion);
  hello.set_epoch(service_.promised());
  std::lock_guard<std::mutex> lock(mutex_);
  if (!held_.model_digest().empty()) {
    *hello.mutable_held() = held_;
  }
  return hello;
}

internal::v1::WorkerStats Worker::Stats() {
  internal::v1::WorkerStats stats;
  stats.set_resident_bytes(ResidentBytes());
  std::lock_guard<std::mutex> lock(mutex_);
  if (session_ != nullptr) {
    const StepStats steps = session_->loop->TakeStats();
    stats.set_steps(steps.steps);
    stats.set_step_us_p50(steps.step_us_p50);
    stats.set_step_us_p99(steps.step_us_p99);
    stats.set_queue_depth(steps.queue_depth);
    stats.set_busy(steps.busy);
  }
  return stats;
}

void Worker::TakeOrder(internal::v1::AttachResponse order) {
  if (order.has_configure()) {
    Post(std::move(*order.mutable_configure()));
  } else if (order.has_halt()) {
    Post(order.halt());
  } else if (order.has_release()) {
    Post(order.release());
  } else {
    rpc::LogWarning("unknown_order", {{"worker_id", options_.worker_id}});
  }
}

bool Worker::Supersedes(const Event& event) const {
  if (const auto* halt = std::get_if<HaltOrder>(&event)) {
    return halt->epoch() >= loading_epoch_;
  }
  return !std::holds_alternative<Fault>(event);
}

void Worker::Post(Event event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (cancellation_ != nullptr && Supersedes(event)) {
    cancellation_->Cancel();
  }
  events_.push_back(std::move(event));
  posted_.notify_one();
}

void Worker::Stop() { Post(Stopped{}); }

Worker::Event Worker::NextEvent() {
  std::unique_lock<std::mutex> lock(mutex_);
  cancellation_.reset();
  posted_.wait(lock, [this] { return !events_.empty(); });
  Event event = std::move(events_.front());
  events_.pop_front();
  if (const auto* order = std::get_if<ConfigureOrder>(&event)) {
    loading_epoch_ = order->epoch();
    cancellation_ = std::make_unique<Cancellation>();
    for (const Event& later : events_) {
      if (Supersedes(later)) {
        cancellation_->Cancel();
      }
    }
  }
  return event;
}

void Worker::Run() {
  while (true) {
    const Event event = NextEvent();
    if (const auto* order = std::get_if<ConfigureOrder>(&event)) {
      Configure(*order);
    } else if (const auto* halt = std::get_if<HaltOrder>(&event)) {
      if (session_ != nullptr && session_->epoch <= halt->epoch()) {
        CloseSession();
      }
    } else if (const auto* fault = std::get_if<Fault>(&event)) {
      if (session_ != nullptr && session_->epoch == fault->epoch) {
        CloseSession();
        SendFault(fault->epoch, fault->status);
      }
    } else if (std::holds_alternative<Detached>(event)) {
      CloseSession();
    } else {
      break;  // Released or stopped
    }
  }
  rpc::LogInfo("worker_ending", {{"worker_id", options_.worker_id}});
  SLUICE_FAULT_POINT("worker.ending");
  attach_->Stop();
  CloseSession();
  server_->Shutdown(/*grace_ms=*/0);
}

void Worker::Configure(const ConfigureOrder& order) {
  SLUICE_FAULT_POINT("worker.configure");
  CloseSession();
  absl::Status status = service_.Promise(order.epoch());
  if (status.ok()) {
    status = Load(order);
  }
  if (status.ok()) {
    status = OpenSession(order);
  }
  if (status.ok()) {
    SLUICE_FAULT_POINT("worker.before_ready");
    SendReady(order.epoch());
    SLUICE_FAULT_POINT("worker.after_ready");
  } else if (!cancellation_->cancelled()) {
    CloseSession();
    SendFault(order.epoch(), status);
  } else {
    rpc::LogInfo("configure_superseded", {{"epoch", order.epoch()}});
    CloseSession();
  }
}

absl::Status Worker::Load(const ConfigureOrder& order) {
  if (engine_ != nullptr && HoldsSameWeights(engine_->assignment(), order.assignment())) {
    absl::Status status = engine_->Reconfigure(order.assignment());
    SLUICE_FAULT_POINT("worker.weights_kept");
    rpc::LogInfo("shard_kept", {{"epoch", order.epoch()}, {"status", status}});
    if (status.ok()) {
      metrics_.SetMemory(engine_->memory(), options_.memory_bytes);
      std::lock_guard<std::mutex> lock(mutex_);
      held_ = order.assignment();
      return status;
    }
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    held_.Clear();
  }
  engine_.reset();  // Its memory is needed for the next one
  metrics_.SetMemory({}, options_.memory_bytes);
  SLUICE_RETURN_IF_ERROR(Fetch(order));
  metrics_.SetMemory(engine_->memory(), options_.memory_bytes);
  std::lock_guard<std::mutex> lock(mutex_);
  held_ = order.assignment();
  return absl::OkStatus();
}

absl::Status Worker::Fetch(const ConfigureOrder& order) {
  const auto begin = std::chrono::steady_clock::now();
  SLUICE_ASSIGN_OR_RETURN(auto loader, make_loader_(order.assignment()));
  FetchOptions options;
  options.max_tensor_bytes = options_.memory_bytes;
  auto sent_at = begin - kProgressInterval;
  options.on_progress = [&](uint64_t done, uint64_t total) {
    const auto now = std::chrono::steady_clock::now();
    if (now - sent_at >= kProgressInterval || done == total) {
      sent_at = now;
      AttachRequest event;
      event.mutable_load_progress()->set_epoch(order.epoch());
      event.mutable_load_progress()->set_bytes_done(done);
      event.mutable_load_progress()->set_bytes_total(total);
      attach_->Send(event);
    }
  };
  SLUICE_RETURN_IF_ERROR(
      FetchShard(order.assignment(), options, loader.get(), cancellation_.get()));
  SLUICE_FAULT_POINT("worker.fetched");
  SLUICE_ASSIGN_OR_RETURN(engine_, loader->Finish());
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  metrics_.load_seconds.Observe(seconds.count());
  rpc::LogInfo("shard_loaded", {{"epoch", order.epoch()},
                                {"layer_begin", order.assignment().layers().begin()},
                                {"layer_end", order.assignment().layers().end()},
                                {"weight_bytes", engine_->memory().weight_bytes},
                                {"seconds", seconds.count()}});
  return absl::OkStatus();
}

absl::Status Worker::OpenSession(const ConfigureOrder& order) {
  const auto on_error = [this, epoch = order.epoch()](absl::Status status) {
    Post(Fault{epoch, std::move(status)});
  };
  auto session = std::make_unique<Session>();
  session->epoch = order.epoch();
  StageLink::Options link;
  link.epoch = order.epoch();
  link.assignment = order.assignment();
  link.controller_address = options_.controller_address;
  link.hidden_dtype = engine_->hidden_dtype();
  link.metrics = metrics_.OfStage(order.assignment().stage());
  SLUICE_ASSIGN_OR_RETURN(session->link, StageLink::Open(link, cancellation_.get(), on_error));
  session->loop =
      std::make_unique<StepLoop>(engine_.get(), session->link.get(), on_error, link.metrics);
  StageService::Session open;
  open.stage = order.assignment().stage();
  open.stages = order.assignment().stages();
  open.format.epoch = order.epoch();
  open.format.row_bytes = static_cast<uint64_t>(engine_->hidden_row_bytes());
  open.format.dtype = engine_->hidden_dtype();
  open.format.max_tokens = order.assignment().max_batch_tokens();
  open.loop = session->loop.get();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    session_ = std::move(session);
  }
  SLUICE_FAULT_POINT("worker.before_open");
  service_.Open(open);
  server_->SetReady(true);
  metrics_.serving.Set(1);
  return absl::OkStatus();
}

// Order matters: what waits on another part is told to stop before that part is waited for.
void Worker::CloseSession() {
  if (session_ == nullptr) {
    return;
  }
  SLUICE_FAULT_POINT("worker.session_closing");
  server_->SetReady(false);
  metrics_.serving.Set(0);
  session_->link->Stop();
  session_->loop->Stop();
  service_.Close();
  std::unique_ptr<Session> session;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    session = std::move(session_);
  }
  rpc::LogInfo("session_closed", {{"worker_id", options_.worker_id}, {"epoch", session->epoch}});
}

void Worker::SendReady(uint64_t epoch) {
  const StageMemory memory = engine_->memory();
  AttachRequest event;
  auto* ready = event.mutable_ready();
  ready->set_epoch(epoch);
  ready->set_weight_bytes(memory.weight_bytes);
  ready->set_kv_bytes(memory.kv_bytes);
  ready->set_workspace_bytes(memory.workspace_bytes);
  ready->set_transport(session_->link->transport());
  rpc::LogInfo("worker_ready", {{"worker_id", options_.worker_id},
                                {"epoch", epoch},
                                {"kv_bytes", memory.kv_bytes},
                                {"transport", ready->transport()}});
  attach_->Send(event);
}

void Worker::SendFault(uint64_t epoch, const absl::Status& status) {
  metrics_.faults.Add();
  rpc::LogError("worker_fault",
                {{"worker_id", options_.worker_id}, {"epoch", epoch}, {"error", status}});
  AttachRequest event;
  event.mutable_fault()->set_epoch(epoch);
  event.mutable_fault()->set_code(static_cast<int32_t>(status.code()));
  event.mutable_fault()->set_message(status.ToString());
  attach_->Send(event);
}

}  // namespace sluice::worker
