// A host that falls silent without closing its connections is noticed by both ends, through
// keepalive alone. A proxy between them stands for the network.
#include <arpa/inet.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <string>
#include <thread>

#include "services/rpc/channel.h"
#include "services/rpc/server_runner.h"

namespace sluice::rpc {
namespace {

// Forwards one connection to 127.0.0.1:port until Freeze(); then it holds every byte back.
class Proxy {
 public:
  explicit Proxy(int port) : target_(port), listener_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address = Address(0);
    EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    EXPECT_EQ(listen(listener_, 1), 0);
    socklen_t size = sizeof(address);
    getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] { Forward(); });
  }
  ~Proxy() {
    stopped_ = true;
    thread_.join();
    close(listener_);
  }
  int port() const { return port_; }
  void Freeze() { frozen_ = true; }

 private:
  static sockaddr_in Address(int port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<uint16_t>(port));
    return address;
  }

  void Forward() {
    const int near = accept(listener_, nullptr, nullptr);
    const int far = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = Address(target_);
    EXPECT_EQ(connect(far, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    pollfd fds[2] = {{near, POLLIN, 0}, {far, POLLIN, 0}};
    char buffer[4096];
    while (!stopped_) {
      if (frozen_ || poll(fds, 2, 20) <= 0) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        continue;
      }
      for (int i = 0; i < 2; ++i) {
        if (fds[i].revents != 0) {
          const ssize_t size = read(fds[i].fd, buffer, sizeof(buffer));
          if (size <= 0 || write(fds[1 - i].fd, buffer, size) != size) {
            stopped_ = true;
          }
        }
      }
    }
    close(near);
    close(far);
  }

  const int target_;
  const int listener_;
  int port_ = 0;
  std::atomic<bool> frozen_{false};
  std::atomic<bool> stopped_{false};
  std::thread thread_;
};

TEST(Keepalive, SilentPeerIsNoticed) {
  ServerOptions options;
  options.addresses = {"127.0.0.1:0"};
  auto server = ServerRunner::Start(options, {});
  ASSERT_TRUE(server.ok()) << server.status();
  Proxy proxy((*server)->ports().front());
  const auto channel =
      MakeChannel("127.0.0.1:" + std::to_string(proxy.port()), ChannelKind::kControl);

  // Health.Watch("live"): a stream that stays open and says nothing more.
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  void* tag = nullptr;
  bool ok = false;
  auto call = stub.PrepareCall(&context, "/grpc.health.v1.Health/Watch", &queue);
  call->StartCall(nullptr);
  ASSERT_TRUE(queue.Next(&tag, &ok) && ok);
  grpc::Slice slice(std::string("\x0a\x04live"));
  call->Write(grpc::ByteBuffer(&slice, 1), nullptr);
  ASSERT_TRUE(queue.Next(&tag, &ok) && ok);
  grpc::ByteBuffer update;
  call->Read(&update, nullptr);
  ASSERT_TRUE(queue.Next(&tag, &ok) && ok);

  proxy.Freeze();
  call->Read(&update, nullptr);
  ASSERT_TRUE(queue.Next(&tag, &ok));  // Without keepalive it would wait until CTest's limit
  EXPECT_FALSE(ok);
  grpc::Status status;
  call->Finish(&status, nullptr);
  ASSERT_TRUE(queue.Next(&tag, &ok));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE) << status.error_message();
}

}  // namespace
}  // namespace sluice::rpc
