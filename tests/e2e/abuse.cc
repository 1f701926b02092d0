#include "tests/e2e/abuse.h"

#include <gmock/gmock.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <thread>

namespace sluice::e2e {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kMemoryCounts = false;  // Freed memory is kept on purpose
#else
constexpr bool kMemoryCounts = true;
#endif

constexpr int kGuardSeconds = 60;

// The ids that are the same on every machine, and the prompt before them.
const Golden& GoodRun() {
  static const Golden run = LongestClearRun(ReadGolden("llama-fp16"));
  return run;
}

}  // namespace

std::unique_ptr<Cluster> AbuseTest::cluster_;

MemoryWatch::MemoryWatch(pid_t pid) : pid_(pid), start_mib_(0) {
  std::ofstream("/proc/" + std::to_string(pid) + "/clear_refs") << "5";  // The peak begins anew
  start_mib_ = Read("VmRSS:");
}

double MemoryWatch::Read(const std::string& key) const {
  std::ifstream file("/proc/" + std::to_string(pid_) + "/status");
  for (std::string word; file >> word;) {
    double kib = 0;
    if (word == key && file >> kib) return kib / 1024;
  }
  return 0;
}

double MemoryWatch::peak_growth_mib() const { return Read("VmHWM:") - start_mib_; }
double MemoryWatch::growth_mib() const { return Read("VmRSS:") - start_mib_; }

void AbuseTest::StartCluster(const std::vector<std::string>& controller_flags,
                             int controller_files) {
  cluster_ = std::make_unique<Cluster>(ClusterOptions{.model = CheckpointPath("llama-fp16"),
                                                      .controller_flags = controller_flags,
                                                      .controller_files = controller_files});
  ASSERT_TRUE(cluster_->WaitReady()) << cluster_->Logs();
}

void AbuseTest::SetUp() {
  ASSERT_NE(cluster_, nullptr);
  ASSERT_TRUE(cluster_->controller().running()) << cluster_->Logs();
  GoodAnswer();  // Whatever a first request allocates is there before the memory is watched
  memory_ = std::make_unique<MemoryWatch>(cluster_->controller().pid());
}

// A full queue asks to be tried again, as gRPC's retry policy does.
void AbuseTest::GoodAnswer() {
  const Golden& run = GoodRun();
  const auto request = GreedyRequest(run.prompt, static_cast<uint32_t>(run.greedy.size()));
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(kGuardSeconds);
  Answer answer = cluster_->Stream(request);
  while (answer.status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED &&
         answer.status.error_details().find("RetryInfo") != std::string::npos &&
         std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    answer = cluster_->Stream(request);
  }
  EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_THAT(answer.ids, ::testing::ElementsAreArray(run.greedy));
  EXPECT_TRUE(answer.dense);
}

void AbuseTest::WaitIdle() {
  auto admin = cluster_->Admin();
  v1::GetClusterResponse state;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(kGuardSeconds);
  while (std::chrono::steady_clock::now() < end) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    if (admin->GetCluster(&context, {}, &state).ok() && state.scheduler().used_blocks() == 0 &&
        state.scheduler().running_sequences() == 0 && state.scheduler().queued_requests() == 0) {
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  ADD_FAILURE() << "still busy: " << state.scheduler().ShortDebugString();
}

void AbuseTest::ExpectUnharmed() {
  WaitIdle();
  ASSERT_TRUE(cluster_->controller().running()) << cluster_->Logs();
  GoodAnswer();
  WaitIdle();
}

void AbuseTest::ExpectPeakGrowthBelow(double mib) {
  std::printf("controller memory: peak +%.1f MiB, now +%.1f MiB, bound +%.0f MiB\n",
              memory_->peak_growth_mib(), memory_->growth_mib(), mib);
  if (kMemoryCounts) {
    EXPECT_LT(memory_->peak_growth_mib(), mib);
  }
}

std::unique_ptr<Http2Client> AbuseTest::Attacker(const Http2Client::Options& options) {
  auto client = std::make_unique<Http2Client>(cluster_->public_address(), options);
  EXPECT_TRUE(client->open());
  return client;
}

int AbuseTest::CallStatus(Http2Client* client, const std::string& method,
                          const std::string& request) {
  const uint32_t stream = client->OpenCall(method);
  client->SendMessage(stream, request);
  EXPECT_TRUE(client->ReadUntil([&] { return client->stream(stream).done(); }));
  return client->stream(stream).grpc_status();
}

}  // namespace sluice::e2e
