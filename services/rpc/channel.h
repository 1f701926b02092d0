// Channels of gRPC clients with the settings that Sluice's processes agree on: identity compression
// only, message limits on purpose, keepalive by kind, no HTTP proxy. Every channel has its own
// connection, so that a large message on one never delays another.
#pragma once

#include <grpcpp/channel.h>

#include <memory>
#include <string>

namespace sluice::rpc {

// Largest piece of a tensor in a message, bytes.
inline constexpr int kMaxPieceBytes = 1 << 20;
// Message limit of the ports between processes: a piece and its header.
inline constexpr int kInternalMessageBytes = 2 * kMaxPieceBytes;
// Message limit of the public port.
inline constexpr int kPublicMessageBytes = 4 << 20;

enum class ChannelKind {
  kControl,  // Between processes: Attach, Tokens, PlanShards. Keepalive 2 s, timeout 1 s
  kLink,     // Between processes, tensors: as kControl, and a flow-control window of 16 MB
  kClient,   // To the public port: keepalive 60 s, timeout 20 s
};

// `address` as gRPC has it: "host:port", "dns:///name:port", "unix:/path". Connects when first
// used; reconnects by itself, after 0.1 to 1 s. Plain text.
std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, ChannelKind kind);

// Keeps gRPC up until the process ends; MakeChannel and ServerRunner call it. Otherwise the end of
// the last channel or server shuts the library down, which in 1.51 can wait 10 s for a thread of
// its own.
void KeepGrpcUp();

}  // namespace sluice::rpc
