// The public port under abuse of HTTP/2 itself (A9 to A14 of the threat list): bombs, floods,
// windows that stay shut, streams that are left. Frames are made by hand (tests/support).
// SLUICE_ABUSE=full takes the full sizes.
#include <zlib.h>

#include <thread>

#include "tests/e2e/abuse.h"

namespace sluice::e2e {
namespace {

class ConnectionAbuseTest : public AbuseTest {
 protected:
  static void SetUpTestSuite() { StartCluster({"--write-deadline-ms", "1000"}); }
  static void TearDownTestSuite() { StopCluster(); }

  // A good request, serialized.
  static std::string Request(uint32_t max_tokens) {
    return GreedyRequest({1, 5, 6, 7}, max_tokens).SerializeAsString();
  }
};

// `mib` MiB of zeros, gzip: a thousandth of that. One piece is compressed and repeated; the checksum
// at the end is wrong, which nobody can know before all is inflated.
std::string GzipBomb(int mib) {
  z_stream stream = {};
  deflateInit2(&stream, 9, Z_DEFLATED, 15 + 16, 9, Z_DEFAULT_STRATEGY);
  std::string zeros(1 << 20, '\0');
  std::string out, piece(1 << 20, '\0');
  const auto deflate_piece = [&] {
    stream.next_in = reinterpret_cast<Bytef*>(zeros.data());
    stream.avail_in = static_cast<uInt>(zeros.size());
    stream.next_out = reinterpret_cast<Bytef*>(piece.data());
    stream.avail_out = static_cast<uInt>(piece.size());
    deflate(&stream, Z_FULL_FLUSH);
    return piece.substr(0, piece.size() - stream.avail_out);
  };
  out = deflate_piece();  // With the header
  const std::string again = deflate_piece();
  for (int i = 1; i < mib; ++i) out += again;
  deflateEnd(&stream);
  return out + std::string("\x03\x00", 2) + std::string(8, '\0');  // An empty last block
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

// Rapid reset: each stream is a whole call, given up at once.
TEST_F(ConnectionAbuseTest, A10ResetFlood) {
  const int per_connection = Count(400, 4000);
  const bool ack = false;
  std::vector<std::thread> floods;
  for (int i = 0; i < 10; ++i) {
    floods.emplace_back([&, i] {
      auto client = Attacker({.source = "127.0.1." + std::to_string(i + 1), .ack_settings = ack});
      const std::string request = Request(200);
      for (int k = 0; k < per_connection && client->open(); ++k) {
        const uint32_t stream = client->OpenCall(kGenerate);
        client->SendFrame(FrameType::kData, 1, stream,
                          std::string(5 - 1, '\0') + static_cast<char>(request.size()) + request);
        client->Reset(stream);
        client->Forget(stream);
        if (k % 50 == 49) client->Flush();
      }
      client->Flush(); std::printf("opened %u open %d goaway %d\n", client->streams_opened(), client->open(), client->goaway());
    });
  }
  GoodAnswer();
  for (std::thread& flood : floods) flood.join();
  ExpectUnharmed();
  ExpectPeakGrowthBelow(64);
}

}  // namespace
}  // namespace sluice::e2e
