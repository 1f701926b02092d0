// The public port under abuse of HTTP/2 itself (A8 to A14 of tests/README.md): bombs, floods,
// windows that stay shut, streams that are left. Frames are made by hand (tests/support).
#include <zlib.h>

#include <chrono>
#include <thread>

#include "tests/e2e/abuse.h"

namespace sluice::e2e {
namespace {

class ConnectionAbuseTest : public AbuseTest {
 protected:
  static void SetUpTestSuite() { StartCluster({"--write-deadline-ms", "1000"}); }
  static void TearDownTestSuite() { StopCluster(); }
};

// A good request of 200 tokens, serialized.
std::string LongRequest() { return GreedyRequest({1, 5, 6, 7}, 200).SerializeAsString(); }

// `mib` MiB of zeros, gzip: a thousandth of that. One piece is compressed and repeated; the checksum
// at the end is wrong, which nobody can know before all is inflated.
std::string GzipBomb(int mib) {
  z_stream stream = {};
  deflateInit2(&stream, 9, Z_DEFLATED, 15 + 16, 9, Z_DEFAULT_STRATEGY);
  std::string zeros(1 << 20, '\0'), piece(1 << 20, '\0');
  const auto deflate_piece = [&] {
    stream.next_in = reinterpret_cast<Bytef*>(zeros.data());
    stream.avail_in = static_cast<uInt>(zeros.size());
    stream.next_out = reinterpret_cast<Bytef*>(piece.data());
    stream.avail_out = static_cast<uInt>(piece.size());
    deflate(&stream, Z_FULL_FLUSH);
    return piece.substr(0, piece.size() - stream.avail_out);
  };
  std::string bomb = deflate_piece();  // With the header
  const std::string again = deflate_piece();
  for (int i = 1; i < mib; ++i) bomb += again;
  deflateEnd(&stream);
  return bomb + std::string("\x03\x00", 2) + std::string(8, '\0');  // An empty last block
}

TEST_F(ConnectionAbuseTest, A8HeaderBombEndsTheConnection) {
  auto client = Attacker({.source = "127.0.0.2", .ack_settings = false});
  client->OpenCall(kGenerate, {{"x-bomb", std::string(4 << 20, 'b')}});
  EXPECT_TRUE(client->ReadUntil([] { return false; })) << "the connection must end";
  ExpectUnharmed();
  ExpectPeakGrowthBelow(16);
}

TEST_F(ConnectionAbuseTest, A8OtherProtocolsAreSentAway) {
  for (const std::string bytes : {"GET / HTTP/1.1\r\nHost: sluice\r\n\r\n", "\x16\x03\x01\x02"}) {
    auto client = Attacker();
    client->Flush();
    auto other = Attacker({.preface = bytes});
    EXPECT_TRUE(other->ReadUntil([] { return false; })) << "the connection must end";
  }
  ExpectUnharmed();
}

TEST_F(ConnectionAbuseTest, A9CompressedBombIsRefusedUnopened) {
  const std::string bomb = GzipBomb(1024);
  ASSERT_LT(bomb.size(), 2u << 20);
  auto client = Attacker();
  const uint32_t stream = client->OpenCall(kGenerate, {{"grpc-encoding", "gzip"}});
  client->SendMessage(stream, bomb, /*compressed=*/true);
  EXPECT_TRUE(client->ReadUntil([&] { return client->stream(stream).done(); }));
  EXPECT_EQ(client->stream(stream).grpc_status(), grpc::StatusCode::UNIMPLEMENTED);
  ExpectUnharmed();
  ExpectPeakGrowthBelow(16);
}

TEST_F(ConnectionAbuseTest, A9CompressedFlagWithoutAnEncodingIsRefused) {
  auto client = Attacker();
  const uint32_t stream = client->OpenCall(kGenerate);
  client->SendMessage(stream, GzipBomb(64), /*compressed=*/true);
  EXPECT_TRUE(client->ReadUntil([&] { return client->stream(stream).done(); }));
  EXPECT_NE(client->stream(stream).grpc_status(), grpc::StatusCode::OK);
  ExpectUnharmed();
  ExpectPeakGrowthBelow(16);
}

// Rapid reset: 40,000 whole calls over 10 connections, each given up at once, the settings never
// acknowledged. Without the guard gRPC 1.51 starts a handler for each.
TEST_F(ConnectionAbuseTest, A10ResetFlood) {
  std::vector<std::thread> floods;
  for (int i = 1; i <= 10; ++i) {
    floods.emplace_back([&, i] {
      auto client = Attacker({.source = "127.0.1." + std::to_string(i), .ack_settings = false});
      const std::string message = GrpcMessage(LongRequest());
      for (int k = 0; k < 4000 && client->open(); ++k) {
        const uint32_t stream = client->OpenCall(kGenerate);
        client->SendFrame(FrameType::kData, 1, stream, message);
        client->Reset(stream);
        client->Forget(stream);
        if (k % 50 == 49 && !client->Flush()) break;
      }
      client->ReadUntil([] { return false; }, /*seconds=*/2);  // Stays and sends what it has
    });
  }
  for (int i = 0; i < 5; ++i) GoodAnswer();
  for (std::thread& flood : floods) flood.join();
  ExpectUnharmed();
  ExpectPeakGrowthBelow(64);
}

TEST_F(ConnectionAbuseTest, A10StreamsBeyondTheLimitEndTheConnection) {
  auto client = Attacker({.source = "127.0.0.2", .ack_settings = false});
  for (int i = 0; i < 1000; ++i) client->OpenCall(kGenerate);
  EXPECT_TRUE(client->ReadUntil([] { return false; })) << "the connection must end";
  ExpectUnharmed();
  ExpectPeakGrowthBelow(16);
}

TEST_F(ConnectionAbuseTest, A10FloodsOfPingsSettingsAndEmptyFrames) {
  for (const int kind : {0, 1, 2}) {
    auto client = Attacker({.source = "127.0.0.2", .ack_settings = false, .reads = false});
    const uint32_t stream = client->OpenCall(kGenerate);
    for (int i = 0; i < 40000; ++i) {
      if (kind == 0) client->Ping();
      if (kind == 1) client->SendFrame(FrameType::kSettings, 0, 0, "");
      if (kind == 2) client->SendFrame(FrameType::kData, 0, stream, "");
    }
    client->ReadUntil([] { return false; }, /*seconds=*/1);
    GoodAnswer();
  }
  ExpectUnharmed();
  ExpectPeakGrowthBelow(16);
}

// The client's window stays shut after the headers: nothing of the answer can be sent.
TEST_F(ConnectionAbuseTest, A12SlowReaderIsEndedAtTheWriteDeadline) {
  auto client = Attacker({.source = "127.0.0.2", .stream_window = 0});
  std::vector<uint32_t> streams;
  for (int i = 0; i < 40; ++i) {
    streams.push_back(client->OpenCall(i % 2 == 0 ? kStreamGenerate : kGenerate));
    client->SendMessage(streams.back(), LongRequest());
  }
  GoodAnswer();
  for (const uint32_t stream : streams) {
    EXPECT_TRUE(client->ReadUntil([&] { return client->stream(stream).done(); }));
    EXPECT_NE(client->stream(stream).grpc_status(), grpc::StatusCode::OK);
    EXPECT_EQ(client->stream(stream).data, "");
  }
  ExpectUnharmed();
  ExpectPeakGrowthBelow(32);
}

TEST_F(ConnectionAbuseTest, A12ClientThatReadsNothingAtAll) {
  for (int i = 0; i < 4; ++i) {
    auto client = Attacker({.source = "127.0.0.2", .stream_window = 1u << 30, .reads = false});
    for (int k = 0; k < 40; ++k) {
      const uint32_t stream = client->OpenCall(kStreamGenerate);
      client->SendFrame(FrameType::kData, 1, stream, GrpcMessage(LongRequest()));
    }
    client->Flush();
  }
  ExpectUnharmed();
  ExpectPeakGrowthBelow(64);
}

TEST_F(ConnectionAbuseTest, A13CancelAtEachToken) {
  auto stub = cluster_->Generation();
  for (uint32_t k = 0; k < 120; ++k) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    auto reader = stub->StreamGenerate(&context, GreedyRequest({1, 5, 6, k}, 200));
    v1::StreamGenerateResponse message;
    uint32_t tokens = 0;
    while (tokens < k && reader->Read(&message)) {
      tokens += static_cast<uint32_t>(message.token_ids_size());
    }
    context.TryCancel();
    reader->Finish();
  }
  ExpectUnharmed();
  ExpectPeakGrowthBelow(16);
}

TEST_F(ConnectionAbuseTest, A13ConnectionsThatVanish) {
  for (int i = 0; i < 50; ++i) {
    auto client = Attacker();
    for (int k = 0; k < 20; ++k) {
      client->SendMessage(client->OpenCall(kStreamGenerate), LongRequest());
    }
  }
  ExpectUnharmed();
  ExpectPeakGrowthBelow(64);
}

// Headers, and never a message.
TEST_F(ConnectionAbuseTest, A14IdleStreams) {
  std::vector<std::unique_ptr<Http2Client>> clients;
  for (int i = 0; i < 50; ++i) {
    clients.push_back(Attacker());
    for (int k = 0; k < 100; ++k) clients.back()->OpenCall(kStreamGenerate);
    clients.back()->Flush();
  }
  ExpectUnharmed();
  ExpectPeakGrowthBelow(5000 * 64 / 1024.0);
  clients.clear();
  ExpectUnharmed();
}

class FileLimitTest : public AbuseTest {
 protected:
  static void SetUpTestSuite() { StartCluster({}, /*controller_files=*/256); }
  static void TearDownTestSuite() { StopCluster(); }
};

TEST_F(FileLimitTest, A11ConnectionFloodOfOneAddressLeavesRoomForOthers) {
  std::vector<std::unique_ptr<Http2Client>> clients;
  for (int i = 0; i < 1000; ++i) clients.push_back(Attacker());
  ExpectUnharmed();
  ExpectPeakGrowthBelow(32);
}

TEST_F(FileLimitTest, A11ConnectionFloodOfManyAddressesEndsWhenTheyGo) {
  std::vector<std::unique_ptr<Http2Client>> clients;
  for (int i = 0; i < 1000; ++i) {
    clients.push_back(Attacker({.source = "127.0.2." + std::to_string(i % 100 + 1)}));
  }
  clients.clear();
  // The server may hear of their end after the next client has knocked: that one tries again.
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!cluster_->Stream(GreedyRequest({1, 5}, 2)).status.ok() &&
         std::chrono::steady_clock::now() < end) {
  }
  ExpectUnharmed();
  ExpectPeakGrowthBelow(32);
}

}  // namespace
}  // namespace sluice::e2e
