// AbuseTest: a live cluster shared by the tests of a program, a good client beside the bad one, and
// the controller's memory. Bad clients connect from addresses of their own (127.0.0.x), so that the
// server counts them apart from the good one.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/e2e/cluster.h"
#include "tests/support/http2_client.h"

namespace sluice::e2e {

inline constexpr char kGenerate[] = "/sluice.v1.GenerationService/Generate";
inline constexpr char kStreamGenerate[] = "/sluice.v1.GenerationService/StreamGenerate";

// Peak of a process's resident memory since the construction.
class MemoryWatch {
 public:
  explicit MemoryWatch(pid_t pid);
  double peak_growth_mib() const;  // The peak since then, above what it was
  double growth_mib() const;       // What it is now, above what it was

 private:
  double Read(const std::string& key) const;

  pid_t pid_;
  double start_mib_;
};

class AbuseTest : public ::testing::Test {
 protected:
  // The program's cluster: flags of the controller besides the usual ones, its most open files.
  static void StartCluster(const std::vector<std::string>& controller_flags,
                           int controller_files = 0);
  static void StopCluster() { cluster_.reset(); }
  void SetUp() override;
  // The server lives, nothing of the abuse is left, and the good client gets its answer.
  void ExpectUnharmed();
  // The bound holds for a build without sanitizers; the figure is printed in any case.
  void ExpectPeakGrowthBelow(double mib);
  void GoodAnswer();
  void WaitIdle();

  // A bad client.
  std::unique_ptr<Http2Client> Attacker(const Http2Client::Options& options = {
                                            .source = "127.0.0.2"});
  // Call by hand; its status code.
  int CallStatus(Http2Client* client, const std::string& method, const std::string& request);

  static std::unique_ptr<Cluster> cluster_;
  std::unique_ptr<MemoryWatch> memory_;
};

}  // namespace sluice::e2e
