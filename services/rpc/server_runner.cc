#include "services/rpc/server_runner.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_builder.h>

#include <chrono>
#include <mutex>

#include "absl/strings/str_join.h"
#include "services/rpc/channel.h"

namespace sluice::rpc {
namespace {

// Once a process: both are global switches of gRPC.
void EnablePlugins() {
  static std::once_flag once;
  std::call_once(once, [] {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  });
}

void SetLimits(const ServerOptions& options, grpc::ServerBuilder* builder) {
  const bool is_public = options.kind == ServerKind::kPublic;
  const int message_bytes = is_public ? kPublicMessageBytes : kInternalMessageBytes;
  builder->SetMaxReceiveMessageSize(message_bytes);
  builder->SetMaxSendMessageSize(message_bytes);
  // A compressed message is inflated before its size is checked: only identity is accepted.
  builder->SetDefaultCompressionAlgorithm(GRPC_COMPRESS_NONE);
  builder->AddChannelArgument(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET,
                              1 << GRPC_COMPRESS_NONE);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options.max_concurrent_streams);
  builder->AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, 8 * 1024);
  builder->AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, 10000);
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // Or two servers share a port silently
  builder->SetResourceQuota(
      grpc::ResourceQuota(is_public ? "public" : "internal").Resize(256 << 20).SetMaxThreads(64));
  builder->SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::NUM_CQS, 1);
}

void SetConnections(const ServerOptions& options, grpc::ServerBuilder* builder) {
  const bool is_public = options.kind == ServerKind::kPublic;
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 2);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                              is_public ? 10000 : 1000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, is_public ? 60000 : 2000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, is_public ? 20000 : 1000);
  if (is_public) {
    builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, 5 * 60 * 1000);
    builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS, 30 * 60 * 1000);
    builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS, options.age_grace_ms);
  } else {
    builder->AddChannelArgument(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 16 << 20);
    builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kMaxPieceBytes);
    builder->AddChannelArgument(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  }
}

bool IsUnix(const std::string& address) { return address.rfind("unix:", 0) == 0; }

bool IsGuarded(const ServerOptions& options, const std::string& address) {
  return options.guard && !IsUnix(address);
}

}  // namespace

absl::Status ServerRunner::StartGuards(const ServerOptions& options) {
  for (size_t i = 0; i < options.addresses.size(); ++i) {
    if (!IsGuarded(options, options.addresses[i])) {
      continue;
    }
    GuardOptions guard = options.guard_options;
    guard.address = options.addresses[i];
    guard.frames.max_streams = static_cast<uint32_t>(options.max_concurrent_streams);
    auto started = FrameGuard::Start(guard, [acceptor = acceptor_](int fd) {
      grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters connection;
      connection.fd = fd;
      acceptor->HandleNewConnection(&connection);
    });
    if (!started.ok()) {
      return started.status();
    }
    ports_[i] = (*started)->port();
    guards_.push_back(*std::move(started));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<ServerRunner>> ServerRunner::Start(
    const ServerOptions& options, absl::Span<grpc::Service* const> services) {
  if (options.addresses.empty()) {
    return absl::InvalidArgumentError("a server needs an address to listen on, e.g. 127.0.0.1:0");
  }
  KeepGrpcUp();
  EnablePlugins();
  auto runner = std::unique_ptr<ServerRunner>(new ServerRunner());
  runner->ports_.resize(options.addresses.size());
  grpc::ServerBuilder builder;
  SetLimits(options, &builder);
  SetConnections(options, &builder);
  for (size_t i = 0; i < options.addresses.size(); ++i) {
    if (!IsGuarded(options, options.addresses[i])) {
      builder.AddListeningPort(options.addresses[i], grpc::InsecureServerCredentials(),
                               &runner->ports_[i]);
    }
  }
  if (options.guard) {
    runner->acceptor_ = builder.experimental().AddExternalConnectionAcceptor(
        grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD,
        grpc::InsecureServerCredentials());
  }
  for (grpc::Service* service : services) {
    builder.RegisterService(service);
  }
  runner->server_ = builder.BuildAndStart();
  if (runner->server_ == nullptr) {
    return absl::UnavailableError("cannot listen on " + absl::StrJoin(options.addresses, ", ") +
                                  ": the port is taken or the address is not one of this host; "
                                  "choose another, or port 0");
  }
  for (size_t i = 0; i < options.addresses.size(); ++i) {
    if (IsUnix(options.addresses[i])) {
      runner->ports_[i] = 0;
    }
  }
  if (absl::Status status = runner->StartGuards(options); !status.ok()) {
    return status;
  }
  runner->ready_names_ = options.ready_names;
  runner->ready_names_.insert(runner->ready_names_.end(), {"", "ready"});
  runner->server_->GetHealthCheckService()->SetServingStatus("live", true);
  runner->SetReady(false);
  return runner;
}

ServerRunner::~ServerRunner() {
  if (server_ != nullptr) {
    Shutdown(0);
  }
  server_.reset();  // Ends its connections; the guards pass the last bytes on
  guards_.clear();
}

void ServerRunner::SetReady(bool ready) {
  for (const std::string& name : ready_names_) {
    server_->GetHealthCheckService()->SetServingStatus(name, ready);
  }
}

void ServerRunner::Shutdown(int grace_ms) {
  for (const auto& guard : guards_) {
    guard->StopListening();
  }
  server_->Shutdown(std::chrono::system_clock::now() + std::chrono::milliseconds(grace_ms));
  server_->Wait();
}

}  // namespace sluice::rpc
