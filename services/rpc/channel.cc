#include "services/rpc/channel.h"

#include <grpc/grpc.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

namespace sluice::rpc {
namespace {

void SetInternal(grpc::ChannelArguments* args) {
  args->SetMaxReceiveMessageSize(kInternalMessageBytes);
  args->SetMaxSendMessageSize(kInternalMessageBytes);
  // A silent host must be seen within 3 s. Servers between processes accept a ping a second.
  args->SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 2000);
  args->SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 1000);
  args->SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
}

void SetLink(grpc::ChannelArguments* args) {
  // The window covers several pieces in flight; the default of 64 KB stops the sender after each 64
  // KB. With a fixed window the probe that would resize it only costs pings.
  args->SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 16 << 20);
  args->SetInt(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kMaxPieceBytes);
  args->SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
}

}  // namespace

void KeepGrpcUp() {
  static const bool kept = [] {
    grpc_init();  // Never given back, on purpose
    return true;
  }();
  static_cast<void>(kept);
}

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, ChannelKind kind) {
  KeepGrpcUp();
  grpc::ChannelArguments args;
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // Its own connection
  args.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  args.SetCompressionAlgorithm(GRPC_COMPRESS_NONE);
  args.SetInt(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1 << GRPC_COMPRESS_NONE);
  args.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  args.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 3000);  // Also the time a connect may take
  if (kind == ChannelKind::kClient) {
    args.SetMaxReceiveMessageSize(kPublicMessageBytes);
    args.SetMaxSendMessageSize(kPublicMessageBytes);
    args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 60000);
    args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20000);
  } else {
    SetInternal(&args);
  }
  if (kind == ChannelKind::kLink) {
    SetLink(&args);
  }
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), args);
}

}  // namespace sluice::rpc
