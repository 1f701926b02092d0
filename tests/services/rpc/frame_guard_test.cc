// The guard of frames: its judgement byte by byte on a made-up clock, and the sockets around it,
// with an echo in gRPC's place.
#include "services/rpc/frame_guard.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstddef>
#include <mutex>

#include "services/rpc/frame_scan.h"
#include "services/rpc/peer_limits.h"

namespace sluice::rpc {
namespace {

using Verdict = FrameScan::Verdict;
using std::chrono::milliseconds;

constexpr char kPreface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
enum Type : uint8_t { kData, kHeaders, kPriority, kReset, kSettings, kPush, kPing };
constexpr uint8_t kContinuation = 9;
constexpr uint8_t kEndStream = 1, kEndHeaders = 4;

std::string Frame(uint8_t type, uint8_t flags, uint32_t stream, size_t length = 0) {
  std::string frame;
  for (const uint32_t part : {length >> 16, length >> 8, length}) {
    frame.push_back(static_cast<char>(part));
  }
  frame.push_back(static_cast<char>(type));
  frame.push_back(static_cast<char>(flags));
  for (const int shift : {24, 16, 8, 0}) frame.push_back(static_cast<char>(stream >> shift));
  return frame + std::string(length, 'p');
}

class FrameScanTest : public testing::Test {
 protected:
  FrameScanTest() {
    limits_.max_streams = 3;
    limits_.header_bytes = 100;
    limits_.resets = 2;
    limits_.resets_per_second = 10;
    limits_.controls = 4;
    limits_.controls_per_second = 10;
    scan_ = std::make_unique<FrameScan>(limits_, now_);
  }
  Verdict Send(const std::string& bytes) {
    in_ += bytes;
    return scan_->FromClient(now_, &in_, &out_);
  }
  void Greet() {
    ASSERT_EQ(Send(kPreface), Verdict::kGoOn);
    ASSERT_TRUE(scan_->greeted());
    out_.clear();
  }

  FrameLimits limits_;
  FrameScan::Time now_{};
  std::unique_ptr<FrameScan> scan_;
  std::string in_, out_;
};

TEST_F(FrameScanTest, PassesWhatAClientSendsByteByByteAsInOne) {
  std::string all = kPreface + Frame(kSettings, 0, 0, 12);
  for (uint32_t stream = 1; stream <= 41; stream += 2) {
    all += Frame(kHeaders, kEndHeaders, stream, 40) + Frame(kData, kEndStream, stream, 300);
  }
  const std::string answer = Frame(kHeaders, kEndHeaders | kEndStream, 1, 5);
  for (const char byte : all) {
    ASSERT_EQ(Send(std::string(1, byte)), Verdict::kGoOn) << scan_->reason();
    for (uint32_t stream = 1; stream <= 41; stream += 2) {  // Each stream is answered at once
      const std::string end = Frame(kData, kEndStream, stream, 3);
      scan_->FromServer(end.data(), 4);
      scan_->FromServer(end.data() + 4, end.size() - 4);
    }
  }
  EXPECT_EQ(out_, all);
  EXPECT_EQ(in_, "");
}

TEST_F(FrameScanTest, EndsWhatIsNoHttp2) {
  EXPECT_EQ(Send("PRI * HTTP/2"), Verdict::kGoOn);
  EXPECT_EQ(Send(".1"), Verdict::kEnd);
  EXPECT_EQ(out_, "");
}

TEST_F(FrameScanTest, EndsAtOneStreamTooMany) {
  Greet();
  for (const uint32_t stream : {1u, 3u, 5u}) {
    EXPECT_EQ(Send(Frame(kHeaders, kEndHeaders, stream, 9)), Verdict::kGoOn);
  }
  const std::string end = Frame(kHeaders, kEndStream | kEndHeaders, 3, 4);
  scan_->FromServer(end.data(), end.size());
  EXPECT_EQ(Send(Frame(kHeaders, kEndHeaders, 7, 9)), Verdict::kGoOn);
  const std::string reset = Frame(kReset, 0, 5, 4);
  scan_->FromServer(reset.data(), reset.size());
  EXPECT_EQ(Send(Frame(kHeaders, kEndHeaders, 9, 9)), Verdict::kGoOn);
  EXPECT_EQ(Send(Frame(kHeaders, kEndHeaders | kEndStream, 7, 9)), Verdict::kGoOn) << "trailers";
  EXPECT_EQ(scan_->open_streams(), 3u);
  EXPECT_EQ(Send(Frame(kHeaders, kEndHeaders, 11, 9)), Verdict::kEnd);
}

TEST_F(FrameScanTest, ResetsBeyondTheirRateWait) {
  Greet();
  for (const uint32_t stream : {1u, 3u, 5u}) {
    Send(Frame(kHeaders, kEndHeaders, stream, 9));
  }
  EXPECT_EQ(Send(Frame(kReset, 0, 1, 4)), Verdict::kGoOn);
  EXPECT_EQ(Send(Frame(kReset, 0, 3, 4)), Verdict::kGoOn);
  out_.clear();
  const std::string over = Frame(kReset, 0, 5, 4), next = Frame(kData, 0, 5, 1);
  EXPECT_EQ(Send(over + next), Verdict::kWait);
  EXPECT_EQ(out_, over) << "what gives work up is not held back";
  EXPECT_EQ(scan_->wait_until(), now_ + milliseconds(100));
  now_ = scan_->wait_until();
  EXPECT_EQ(Send(""), Verdict::kGoOn);
  EXPECT_EQ(out_, over + next);
  EXPECT_EQ(scan_->open_streams(), 0u);
  Send(Frame(kReset, 0, 5, 4));
  EXPECT_EQ(Send(next), Verdict::kGoOn) << "a stream that has ended costs nothing";
}

TEST_F(FrameScanTest, ControlFramesBeyondTheirRateWait) {
  Greet();
  for (const auto& [type, flags] :
       {std::pair<uint8_t, uint8_t>{kPing, 0}, {kSettings, 0}, {kPriority, 0}, {kData, 0}}) {
    EXPECT_EQ(Send(Frame(type, flags, 0)), Verdict::kGoOn);
  }
  EXPECT_EQ(Send(Frame(kData, 0, 1, 1)), Verdict::kGoOn) << "data with content costs nothing";
  const std::string answer = Frame(kData, 0, 1, 3);
  scan_->FromServer(answer.data(), answer.size());
  EXPECT_EQ(Send(Frame(kPing, 0, 0, 8)), Verdict::kGoOn) << "an answer may be measured by a ping";
  EXPECT_EQ(Send(Frame(kPing, 0, 0, 8) + Frame(kPing, 0, 0, 8)), Verdict::kWait);
}

TEST_F(FrameScanTest, EndsHeaderBlocksThatAreTooLargeOrInterrupted) {
  Greet();
  EXPECT_EQ(Send(Frame(kHeaders, 0, 1, 60)), Verdict::kGoOn);
  EXPECT_EQ(Send(Frame(kContinuation, 0, 1, 40)), Verdict::kGoOn);
  EXPECT_EQ(Send(Frame(kContinuation, kEndHeaders, 1, 1)), Verdict::kEnd);
  FrameScan other(limits_, now_);
  std::string in = kPreface + Frame(kHeaders, 0, 1, 60) + Frame(kPing, 0, 0, 8), out;
  EXPECT_EQ(other.FromClient(now_, &in, &out), Verdict::kEnd);
}

// In gRPC's place: gives back what comes, and knows the peers' names.
class Echo {
 public:
  ~Echo() {
    for (std::thread& thread : threads_) thread.join();
  }
  void Take(int fd) {
    sockaddr_un name = {};
    socklen_t size = sizeof(name);
    getpeername(fd, reinterpret_cast<sockaddr*>(&name), &size);
    std::lock_guard<std::mutex> lock(mutex_);
    peers.emplace_back(name.sun_path + 1, size - offsetof(sockaddr_un, sun_path) - 1);
    threads_.emplace_back([fd] {
      char bytes[4096];
      pollfd readable = {fd, POLLIN, 0};
      while (poll(&readable, 1, -1) == 1) {
        const ssize_t got = read(fd, bytes, sizeof(bytes));
        if (got <= 0) break;
        for (ssize_t at = 0; at < got;) {
          const ssize_t n = send(fd, bytes + at, static_cast<size_t>(got - at), MSG_NOSIGNAL);
          if (n > 0) at += n;
          if (n < 0 && errno != EAGAIN) break;
        }
      }
      close(fd);
    });
  }
  std::vector<std::string> peers;

 private:
  std::mutex mutex_;
  std::vector<std::thread> threads_;
};

class FrameGuardTest : public testing::Test {
 protected:
  void Start(GuardOptions options) {
    options.address = "127.0.0.1:0";
    auto started = FrameGuard::Start(options, [this](int fd) { echo_.Take(fd); });
    ASSERT_TRUE(started.ok()) << started.status();
    guard_ = *std::move(started);
  }
  int Connect() {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(guard_->port()));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    return fd;
  }
  // What the other side sends until it ends, or `most` bytes.
  static std::string Read(int fd, size_t most = SIZE_MAX) {
    std::string all;
    char bytes[4096];
    ssize_t got = 0;
    while (all.size() < most && (got = read(fd, bytes, sizeof(bytes))) > 0) {
      all.append(bytes, static_cast<size_t>(got));
    }
    return all;
  }

  Echo echo_;
  std::unique_ptr<FrameGuard> guard_;
};

TEST_F(FrameGuardTest, PassesBytesBothWaysAndTheEndOfEach) {
  Start({});
  std::string all = kPreface;
  for (int i = 0; i < 100; ++i) all += Frame(kData, 0, 1, 40000);
  const int fd = Connect();
  std::thread writer([&] {
    for (size_t at = 0; at < all.size();) {
      const ssize_t n = write(fd, all.data() + at, all.size() - at);
      ASSERT_GT(n, 0);
      at += static_cast<size_t>(n);
    }
    shutdown(fd, SHUT_WR);
  });
  EXPECT_EQ(Read(fd), all);
  writer.join();
  close(fd);
  ASSERT_EQ(echo_.peers.size(), 1u);
  EXPECT_EQ(PeerLimits::PeerOf("unix-abstract:" + echo_.peers[0]), "ipv4:127.0.0.1");
}

TEST_F(FrameGuardTest, RefusesConnectionsBeyondTheLimitsAndTakesOthersWhenTheyGo) {
  GuardOptions options;
  options.max_connections_per_peer = 2;
  Start(options);
  const int first = Connect(), second = Connect();
  for (const int fd : {first, second}) {
    ASSERT_EQ(write(fd, kPreface, 24), 24);
    EXPECT_EQ(Read(fd, 24), kPreface);
  }
  const int third = Connect();
  EXPECT_EQ(Read(third), "");
  close(first);
  std::string echoed;
  while (echoed.empty()) {  // Until the first has gone; the test's own timeout ends a wait in vain
    const int fourth = Connect();
    [[maybe_unused]] const ssize_t n = send(fourth, kPreface, 24, MSG_NOSIGNAL);
    echoed = Read(fourth, 24);
    close(fourth);
  }
  EXPECT_EQ(echoed, kPreface);
  close(second);
  close(third);
}

TEST_F(FrameGuardTest, EndsConnectionsThatSayNothing) {
  GuardOptions options;
  options.patience = milliseconds(50);
  Start(options);
  const int fd = Connect();
  EXPECT_EQ(Read(fd), "");
  close(fd);
}

TEST_F(FrameGuardTest, ListensNoMoreAndRefusesBadAddresses) {
  Start({});
  guard_.reset();
  GuardOptions options;
  options.address = "127.0.0.1";
  EXPECT_EQ(FrameGuard::Start(options, [](int) {}).status().code(),
            absl::StatusCode::kInvalidArgument);
  options.address = "192.0.2.1:0";  // An address for documentation: nobody's
  EXPECT_EQ(FrameGuard::Start(options, [](int) {}).status().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace sluice::rpc
