#include "services/controller/controller_server.h"

#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <future>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/fault_point.h"
#include "services/rpc/log.h"
#include "services/rpc/process.h"

namespace sluice::controller {
namespace {

constexpr int kLastWritesMs = 2000;

std::string HostName() {
  char name[256] = {};
  return gethostname(name, sizeof(name) - 1) == 0 ? name : "localhost";
}

// Host part of "host:port", "[::1]:port"; the address itself for "unix:...".
std::string HostOf(const std::string& address) { return address.substr(0, address.rfind(':')); }

bool IsUnix(const std::string& address) { return address.rfind("unix:", 0) == 0; }

// `listen` with the port that was chosen.
std::string WithPort(const std::string& listen, int port) {
  return IsUnix(listen) ? listen : absl::StrCat(HostOf(listen), ":", port);
}

// An address that other hosts can dial: of a wildcard, this host's name.
std::string Dialled(const std::string& listen) {
  const std::string host = HostOf(listen);
  const bool wildcard = host == "0.0.0.0" || host == "[::]" || host.empty();
  return wildcard ? absl::StrCat(HostName(), listen.substr(host.size())) : listen;
}

absl::StatusOr<std::unique_ptr<rpc::ServerRunner>> Listen(
    const std::string& address, rpc::ServerOptions options,
    const std::vector<grpc::Service*>& services, std::string* bound) {
  options.addresses = {address};
  auto runner = rpc::ServerRunner::Start(options, services);
  if (runner.ok()) {
    *bound = WithPort(address, (*runner)->ports()[0]);
  }
  return runner;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ControllerServer>> ControllerServer::Start(
    ControllerOptions options) {
  auto server = std::unique_ptr<ControllerServer>(new ControllerServer());
  options.loop.coordinator.host_id = rpc::HostId();
  ControllerServer* self = server.get();
  server->loop_ = std::make_unique<ControllerLoop>(options.loop, &server->pipeline_,
                                                   [self](bool ready) { self->SetReady(ready); });
  server->attach_ = std::make_unique<AttachService>(server->loop_.get());
  server->calls_ = std::make_unique<ClientCalls>(options.clients);
  server->generation_ = std::make_unique<GenerationService>(options.generation, server->loop_.get(),
                                                            server->calls_.get());
  server->model_ = std::make_unique<ModelService>(server->loop_.get(), server->calls_.get());
  server->admin_ = std::make_unique<AdminService>(server->loop_.get());
  if (absl::Status status = server->StartListeners(options); !status.ok()) {
    return status;
  }
  auto metrics_server = metrics::MetricsServer::Start(
      options.metrics_listen, [self](metrics::Page* page) { self->loop_->Collect(page); });
  if (!metrics_server.ok()) {
    return metrics_server.status();
  }
  server->metrics_server_ = *std::move(metrics_server);
  server->loop_->Start(options.internal_advertise.empty() ? Dialled(server->internal_address_)
                                                          : options.internal_advertise);
  server->catalog_ = std::make_unique<ModelCatalog>(
      options.loop.coordinator.loader_address, options.model_name,
      [self](const std::shared_ptr<const ServedModel>& model) { self->loop_->SetModel(model); },
      [self](const absl::Status& status) { self->loop_->OnModelRefused(status); });
  if (absl::Status status = server->WriteAddressFile(options.address_file); !status.ok()) {
    return status;
  }
  rpc::LogInfo("listening", {{"public", server->public_address_},
                             {"internal", server->internal_address_},
                             {"admin", server->admin_address_}});
  if (server->metrics_server_ != nullptr) {
    rpc::LogInfo("metrics_listening", {{"address", server->metrics_server_->address()}});
  }
  return server;
}

absl::Status ControllerServer::StartListeners(const ControllerOptions& options) {
  rpc::ServerOptions internal;
  internal.kind = rpc::ServerKind::kInternal;
  auto internal_server =
      Listen(options.internal_listen, internal, {attach_.get()}, &internal_address_);
  if (!internal_server.ok()) {
    return internal_server.status();
  }
  internal_server_ = *std::move(internal_server);

  rpc::ServerOptions clients;
  clients.kind = rpc::ServerKind::kPublic;
  clients.ready_names = {v1::GenerationService::service_full_name(),
                         v1::ModelService::service_full_name()};
  clients.age_grace_ms = static_cast<int>(options.generation.longest_request.count());
  clients.guard = options.http2_guard;
  auto public_server =
      Listen(options.listen, clients, {generation_.get(), model_.get()}, &public_address_);
  if (!public_server.ok()) {
    return public_server.status();
  }
  public_server_ = *std::move(public_server);

  rpc::ServerOptions admin = clients;
  admin.guard = false;
  admin.ready_names = {v1::AdminService::service_full_name(),
                       v1::ModelService::service_full_name()};
  auto admin_server =
      Listen(options.admin_listen, admin, {admin_.get(), model_.get()}, &admin_address_);
  if (!admin_server.ok()) {
    return admin_server.status();
  }
  admin_server_ = *std::move(admin_server);
  return absl::OkStatus();
}

void ControllerServer::SetReady(bool ready) {
  rpc::LogInfo("ready_changed", {{"ready", ready}});
  public_server_->SetReady(ready);
  admin_server_->SetReady(ready);
}

// Whole or not at all: whoever waits for the file may read it at once.
absl::Status ControllerServer::WriteAddressFile(const std::string& path) const {
  if (path.empty()) {
    return absl::OkStatus();
  }
  nlohmann::json addresses = {
      {"public", public_address_}, {"internal", internal_address_}, {"admin", admin_address_}};
  if (metrics_server_ != nullptr) {
    addresses["metrics"] = metrics_server_->address();
  }
  const std::string temporary = absl::StrCat(path, ".", getpid());
  std::ofstream file(temporary, std::ios::trunc);
  file << addresses.dump() << "\n";
  file.close();
  if (!file || std::rename(temporary.c_str(), path.c_str()) != 0) {
    return absl::UnavailableError(
        absl::StrCat("--address-file: cannot write ", path, ": is its folder there?"));
  }
  return absl::OkStatus();
}

void ControllerServer::Stop(std::chrono::milliseconds drain) {
  if (loop_ == nullptr) {
    return;
  }
  auto drained = std::make_shared<std::promise<void>>();
  loop_->Drain(drain, [drained](uint32_t ended) { drained->set_value(); });
  drained->get_future().wait();
  SLUICE_FAULT_POINT("controller.drained");
  catalog_.reset();
  for (auto* server : {&public_server_, &admin_server_}) {
    if (*server != nullptr) {
      (*server)->Shutdown(kLastWritesMs);
    }
  }
  loop_->Stop();
  if (internal_server_ != nullptr) {
    internal_server_->Shutdown(0);
  }
}

ControllerServer::~ControllerServer() {
  metrics_server_.reset();
  catalog_.reset();
  public_server_.reset();
  admin_server_.reset();
  if (loop_ != nullptr) {
    loop_->Stop();
  }
  internal_server_.reset();
}

}  // namespace sluice::controller
