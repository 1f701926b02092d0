#include "tests/kill_matrix/case.h"

#include <grpcpp/grpcpp.h>
#include <signal.h>

#include <chrono>
#include <fstream>
#include <functional>
#include <optional>
#include <thread>

#include "tests/e2e/cluster.h"

namespace sluice::kill_matrix {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kWaitSeconds = 60;  // For the fault, and for service after it
constexpr int kEndSeconds = 20;   // Drain of 5 s, last resort 10 s after it

double Since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// True when `condition` held within the seconds.
bool WaitUntil(double seconds, const std::function<bool()>& condition) {
  const auto begin = Clock::now();
  while (!condition()) {
    if (Since(begin) > seconds) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return true;
}

// State letter of /proc/PID/stat: 'T' is stopped.
char StateOf(pid_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string number, name, state;
  file >> number >> name >> state;
  return state.empty() ? ' ' : state[0];
}

std::optional<v1::GetClusterResponse> Status(const e2e::Cluster& cluster) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
  v1::GetClusterResponse response;
  if (!cluster.Admin()->GetCluster(&context, {}, &response).ok()) return std::nullopt;
  return response;
}

class Run {
 public:
  Run(const Case& one, const std::vector<Reference>& references)
      : case_(one),
        references_(references),
        fault_(one.point.name + ":" + one.action + ":" + std::to_string(one.nth)),
        cluster_(Options(one, fault_)) {}

  Result Go() {
    {
      Traffic traffic(&cluster_, &references_, EndsBySigterm() && case_.victim == "controller");
      if (Provoke() && AwaitFault() && Recover() && CheckService()) GoOn(traffic);
      traffic.Stop();
      for (const std::string& failure : traffic.failures()) Fail(failure);
      result_.whole = traffic.whole();
      result_.lost = traffic.lost();
      result_.late = traffic.late();
      result_.longest_call = traffic.longest_call();
    }
    if (result_.longest_call > kCallSeconds + 1) Fail("a call went on beyond its deadline");
    if (result_.failures.empty()) CheckIdle();
    if (result_.failures.empty()) CheckEnd();
    if (!result_.failures.empty()) result_.logs = cluster_.Logs();
    return result_;
  }

 private:
  static e2e::ClusterOptions Options(const Case& one, const std::string& fault) {
    e2e::ClusterOptions options{.model = e2e::CheckpointPath(one.checkpoint), .workers = 2};
    if (one.point.scenario != Scenario::kReload) options.faults[one.victim] = fault;
    return options;
  }

  bool Fail(const std::string& text) {
    result_.failures.push_back(text);
    return false;
  }

  bool EndsBySigterm() const {
    return case_.action == "term" || case_.point.scenario == Scenario::kSigterm;
  }
  std::string OtherWorker() const { return case_.victim == "worker-0" ? "worker-1" : "worker-0"; }

  // Brings about what makes the victim pass the point.
  bool Provoke() {
    if (case_.point.scenario == Scenario::kTraffic) return true;
    if (!cluster_.WaitReady(kWaitSeconds)) return Fail("the model was not served before the fault");
    switch (case_.point.scenario) {
      case Scenario::kTraffic:
        break;
      case Scenario::kWorkerLoss:
        cluster_.process(OtherWorker()).Kill();
        cluster_.Start(OtherWorker());
        break;
      case Scenario::kReload:
        cluster_.process(case_.victim).Kill();
        cluster_.Start(case_.victim, fault_);
        cluster_.process(OtherWorker()).Kill();
        cluster_.Start(OtherWorker());
        break;
      case Scenario::kSigterm:
        cluster_.process(case_.victim).Signal(SIGTERM);
        break;
    }
    return true;
  }

  bool AwaitFault() {
    const std::string line = "fault_point: " + case_.point.name + "\n";
    return WaitUntil(kWaitSeconds,
                     [&] { return cluster_.Log(case_.victim).find(line) != line.npos; })
               ? true
               : Fail("the point was not reached");
  }

  // The process ends, with the code that the signal means, and is started again; or it stands still
  // for a while.
  bool Recover() {
    e2e::Process& victim = cluster_.process(case_.victim);
    if (case_.action == "stop") {
      if (!WaitUntil(5, [&] { return StateOf(victim.pid()) == 'T'; })) return Fail("did not stop");
      std::this_thread::sleep_for(std::chrono::duration<double>(case_.stop_seconds));
      victim.Signal(SIGCONT);
      if (case_.point.scenario != Scenario::kSigterm) return true;
    }
    const int expected = case_.action == "kill" ? 128 + SIGKILL : 0;
    const std::optional<int> code = victim.Wait(kEndSeconds);
    if (!code.has_value()) return Fail("the process did not end");
    if (*code != expected) return Fail("the process ended with code " + std::to_string(*code));
    cluster_.Start(case_.victim);
    return true;
  }

  // The controller may say "serving" in the moment before it notices a loss: only an answer counts.
  bool CheckService() {
    const auto begin = Clock::now();
    const Reference& reference = references_.front();
    e2e::Answer answer;
    const bool back = WaitUntil(kWaitSeconds, [&] {
      answer = cluster_.Stream(
          e2e::GreedyRequest(reference.prompt, static_cast<uint32_t>(reference.ids.size())),
          kCallSeconds);
      return answer.status.ok();
    });
    result_.back = Since(begin);
    if (!back) {
      return Fail("no service after the restart: " + answer.status.error_message());
    }
    return answer.ids == reference.ids ? true : Fail("wrong token after the restart");
  }

  // The new plan serves for a while, too: what it loses or leaks is seen at idle.
  void GoOn(const Traffic& traffic) {
    const int whole = traffic.whole(), gone = traffic.gone();
    if (!WaitUntil(kWaitSeconds,
                   [&] { return traffic.whole() >= whole + 8 && traffic.gone() >= gone + 4; })) {
      Fail("clients are not served after the restart");
    }
  }

  // No live request is left, and no block with it.
  void CheckIdle() {
    std::string seen = "no status";
    const bool idle = WaitUntil(10, [&] {
      const std::optional<v1::GetClusterResponse> status = Status(cluster_);
      if (!status.has_value()) return false;
      const v1::SchedulerStats& stats = status->scheduler();
      seen = stats.ShortDebugString();
      return status->state() == v1::MODEL_STATE_SERVING && stats.total_blocks() > 0 &&
             stats.used_blocks() == 0 && stats.running_sequences() == 0 &&
             stats.queued_requests() == 0 &&
             stats.free_blocks() + stats.cached_blocks() == stats.total_blocks();
    });
    if (!idle) Fail("KV blocks or requests are left at idle: " + seen);
  }

  void CheckEnd() {
    for (const std::string name : {"controller", "worker-0", "worker-1", "loader"}) {
      e2e::Process& process = cluster_.process(name);
      if (!process.running()) {
        Fail(name + " had ended by itself");
        continue;
      }
      process.Signal(SIGTERM);
      const std::optional<int> code = process.Wait(kEndSeconds);
      if (code != 0) {
        Fail(name + (code ? " ended with code " + std::to_string(*code) : " did not end") +
             " after SIGTERM");
      }
    }
  }

  const Case case_;
  const std::vector<Reference>& references_;
  const std::string fault_;
  e2e::Cluster cluster_;
  Result result_;
};

}  // namespace

Result RunCase(const Case& one, const std::vector<Reference>& references) {
  return Run(one, references).Go();
}

}  // namespace sluice::kill_matrix
