#include "services/rpc/peer_limits.h"

#include <gtest/gtest.h>

#include <optional>

#include "services/rpc/error_details.h"

namespace sluice::rpc {
namespace {

TEST(PeerLimits, CountsCallsOfEachPeer) {
  PeerLimits limits({.calls = 2, .bytes = 1000, .total_bytes = 10000});
  auto first = limits.Enter("a", 1);
  auto second = limits.Enter("a", 1);
  ASSERT_TRUE(first.ok() && second.ok());
  const absl::Status refused = limits.Enter("a", 1).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(GetDetail<google::rpc::RetryInfo>(refused).has_value());
  EXPECT_TRUE(GetDetail<google::rpc::QuotaFailure>(refused).has_value());
  EXPECT_TRUE(limits.Enter("b", 1).ok());
  { const PeerLimits::Ticket gone = *std::move(first); }
  EXPECT_TRUE(limits.Enter("a", 1).ok());
  EXPECT_EQ(limits.calls(), 1u);
}

TEST(PeerLimits, CountsBytesOfAPeerAndOfAll) {
  PeerLimits limits({.calls = 10, .bytes = 100, .total_bytes = 150});
  auto large = limits.Enter("a", 200);
  EXPECT_TRUE(large.ok()) << "a first call may have any size";
  EXPECT_FALSE(limits.Enter("a", 1).ok());
  EXPECT_FALSE(limits.Enter("b", 1).ok());
  large = absl::CancelledError();
  auto first = limits.Enter("a", 60);
  EXPECT_FALSE(limits.Enter("a", 60).ok());
  auto other = limits.Enter("b", 90);
  EXPECT_TRUE(other.ok());
  EXPECT_FALSE(limits.Enter("c", 1).ok());
}

TEST(PeerLimits, TicketsMoveAndCountOnce) {
  PeerLimits limits({.calls = 1, .bytes = 1, .total_bytes = 1});
  std::optional<PeerLimits::Ticket> ticket = *limits.Enter("a", 1);
  PeerLimits::Ticket moved = *std::move(ticket);
  ticket.reset();  // NOLINT(bugprone-use-after-move): the end of what was moved from is the case
  EXPECT_EQ(limits.calls(), 1u);
  moved = PeerLimits::Ticket();
  EXPECT_EQ(limits.calls(), 0u);
}

TEST(PeerLimits, APeerIsAnAddressWithoutItsPort) {
  EXPECT_EQ(PeerLimits::PeerOf("ipv4:10.0.0.7:51234"), "ipv4:10.0.0.7");
  const std::string network = PeerLimits::PeerOf("ipv6:%5B2001:db8:0:1::7%5D:51234");
  EXPECT_EQ(network, PeerLimits::PeerOf("ipv6:[2001:db8:0:1:ffff::9]:1"));
  EXPECT_NE(network, PeerLimits::PeerOf("ipv6:[2001:db8:0:2::7]:1"));
  EXPECT_EQ(PeerLimits::PeerOf("unix:/run/sluice.sock"), "unix");
  EXPECT_EQ(PeerLimits::PeerOf("unix-abstract:sluice/17/50051/3/ipv4:10.0.0.7"), "ipv4:10.0.0.7");
  EXPECT_EQ(PeerLimits::PeerOf(""), "");
}

}  // namespace
}  // namespace sluice::rpc
