// A server with its limits on a real port: health, reflection, addresses, identity compression.
#include "services/rpc/server_runner.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <future>
#include <string>

#include "services/rpc/channel.h"
#include "services/rpc/process.h"

namespace sluice::rpc {
namespace {

// One unary call with raw bytes.
grpc::Status Call(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                  const std::string& request, std::string* response) {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  grpc::CompletionQueue queue;
  grpc::Slice slice(request);
  const grpc::ByteBuffer in(&slice, 1);
  grpc::ByteBuffer out;
  grpc::Status status;
  auto call = stub.PrepareUnaryCall(&context, method, in, &queue);
  call->StartCall();
  call->Finish(&out, &status, nullptr);
  void* tag;
  bool ok;
  queue.Next(&tag, &ok);
  std::vector<grpc::Slice> slices;
  if (status.ok() && out.Dump(&slices).ok()) {
    for (const auto& part : slices) {
      response->append(reinterpret_cast<const char*>(part.begin()), part.size());
    }
  }
  return status;
}

// HealthCheckRequest{service = 1}; HealthCheckResponse{status = 1}: 1 SERVING, 2 NOT_SERVING. -1:
// not found.
int Health(const std::shared_ptr<grpc::Channel>& channel, const std::string& name) {
  const std::string request = std::string("\x0a") + static_cast<char>(name.size()) + name;
  std::string response;
  const grpc::Status status = Call(channel, "/grpc.health.v1.Health/Check", request, &response);
  return status.ok() && response.size() == 2 ? response[1] : -1;
}

TEST(ServerRunner, HealthFollowsReadyAndLiveStays) {
  ServerOptions options;
  options.addresses = {"127.0.0.1:0"};
  options.ready_names = {"sluice.v1.GenerationService"};
  auto server = ServerRunner::Start(options, {});
  ASSERT_TRUE(server.ok()) << server.status();
  ASSERT_GT((*server)->ports().front(), 0);
  const auto channel =
      MakeChannel("127.0.0.1:" + std::to_string((*server)->ports().front()), ChannelKind::kControl);
  EXPECT_EQ(Health(channel, "live"), 1);
  EXPECT_EQ(Health(channel, "ready"), 2);
  EXPECT_EQ(Health(channel, "sluice.v1.GenerationService"), 2);
  (*server)->SetReady(true);
  EXPECT_EQ(Health(channel, "ready"), 1);
  EXPECT_EQ(Health(channel, ""), 1);
  EXPECT_EQ(Health(channel, "sluice.v1.GenerationService"), 1);
  EXPECT_EQ(Health(channel, "nobody"), -1);
}

TEST(ServerRunner, ListensOnUnixSocketsToo) {
  const std::string path = "/tmp/sluice_rpc_test_" + std::to_string(getpid());
  ServerOptions options;
  options.addresses = {"unix:" + path, "127.0.0.1:0"};
  auto server = ServerRunner::Start(options, {});
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_EQ((*server)->ports()[0], 0);
  EXPECT_GT((*server)->ports()[1], 0);
  EXPECT_EQ(Health(MakeChannel("unix:" + path, ChannelKind::kLink), "live"), 1);
}

TEST(ServerRunner, RefusesATakenPort) {
  ServerOptions options;
  options.addresses = {"127.0.0.1:0"};
  auto first = ServerRunner::Start(options, {});
  ASSERT_TRUE(first.ok());
  options.addresses = {"127.0.0.1:" + std::to_string((*first)->ports().front())};
  const auto second = ServerRunner::Start(options, {});
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  options.addresses = {};
  EXPECT_EQ(ServerRunner::Start(options, {}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ServerRunner, RefusesLargeAndCompressedMessages) {
  ServerOptions options;
  options.addresses = {"127.0.0.1:0"};
  options.kind = ServerKind::kPublic;
  auto server = ServerRunner::Start(options, {});
  ASSERT_TRUE(server.ok());
  const std::string address = "127.0.0.1:" + std::to_string((*server)->ports().front());
  grpc::ChannelArguments args;
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  const auto plain = grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), args);
  const std::string large = std::string("\x0a\xff\xff\xff\x02") + std::string((6 << 20) - 1, 'x');
  std::string response;
  EXPECT_EQ(Call(plain, "/grpc.health.v1.Health/Check", large, &response).error_code(),
            grpc::StatusCode::RESOURCE_EXHAUSTED);
  args.SetCompressionAlgorithm(GRPC_COMPRESS_GZIP);
  const auto gzip = grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), args);
  EXPECT_FALSE(Call(gzip, "/grpc.health.v1.Health/Check",
                    std::string("\x0a\x80\x08") + std::string(1024, 'x'), &response)
                   .ok());
}

TEST(Process, SignalWatcherCallsBack) {
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    std::promise<int> got;
    SignalWatcher watcher([&](int signal) { got.set_value(signal); });
    kill(getpid(), SIGTERM);
    _exit(got.get_future().get() == SIGTERM ? 7 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 7);
}

TEST(Process, DieWithParentSeesAParentThatHasGone) {
  EXPECT_EQ(DieWithParent(getppid()), absl::OkStatus());
  EXPECT_EQ(DieWithParent(getppid() + 1).code(), absl::StatusCode::kFailedPrecondition);
}

// Exit code of a child: 0 when its HostId is ours, 1 when not, 2 when it may not have its own mounts.
int HostIdOfChild(int namespaces) {
  const std::string ours = HostId();
  const pid_t child = fork();
  if (child == 0) {
    if (unshare(namespaces) != 0) {
      _exit(2);
    }
    _exit(HostId() == ours ? 0 : 1);
  }
  int status = 0;
  return waitpid(child, &status, 0) == child ? WEXITSTATUS(status) : -1;
}

TEST(Process, HostIdIsOfThoseThatSeeTheSameFiles) {
  EXPECT_FALSE(HostId().empty());
  EXPECT_EQ(HostIdOfChild(0), 0);
  EXPECT_NE(HostIdOfChild(CLONE_NEWNS), 0);  // As root; else refused
}

}  // namespace
}  // namespace sluice::rpc
