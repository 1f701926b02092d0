// kill_matrix: every fault point x kill -9, SIGSTOP, SIGTERM. Prints a line a run and the tables of
// README.md; exit code 1 when a run failed, 2 for a wrong flag.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <regex>
#include <string>
#include <vector>

#include "tests/kill_matrix/case.h"

namespace sluice::kill_matrix {
namespace {

struct Options {
  std::regex points{".*"};
  std::vector<std::string> actions = {"kill", "stop", "term"};
  unsigned seed = 1;
  int rounds = 1;
  double stop_seconds = 6;
};

struct Total {
  int points = 0, runs = 0, failed = 0, whole = 0, lost = 0, late = 0;
  double longest_call = 0, back = 0;

  void Add(const Result& result) {
    ++runs;
    failed += result.failures.empty() ? 0 : 1;
    whole += result.whole;
    lost += result.lost;
    late += result.late;
    longest_call = std::max(longest_call, result.longest_call);
    back = std::max(back, result.back);
  }
};

// The same seed gives the same passes, victims and checkpoints.
Case MakeCase(const Point& point, const std::string& action, const Options& options, int round) {
  std::seed_seq words(point.name.begin(), point.name.end());
  std::vector<uint32_t> mixed(1);
  words.generate(mixed.begin(), mixed.end());
  std::mt19937 random(mixed[0] + options.seed * 1000 + round * 10 + action.size() +
                      static_cast<unsigned>(action[0]));
  Case one;
  one.point = point;
  one.action = action;
  one.stop_seconds = options.stop_seconds;
  one.nth = 1 + static_cast<int>(random() % point.most_passes);
  one.victim = RoleOf(point);
  if (one.victim == "worker") {
    one.victim += "-" + std::to_string(point.worker >= 0 ? point.worker : random() % 2);
  }
  one.checkpoint = "llama-gptq-v1-g128";
  return one;
}

void PrintRun(const Case& one, const Result& result, double seconds) {
  std::printf("%-32s %-4s pass %3d of %-10s %5.1f s  %4d whole, %3d lost  %s\n",
              one.point.name.c_str(), one.action.c_str(), one.nth, one.victim.c_str(), seconds,
              result.whole, result.lost, result.failures.empty() ? "ok" : "FAILED");
  for (const std::string& failure : result.failures) std::printf("    %s\n", failure.c_str());
  if (!result.logs.empty()) std::printf("%s\n", result.logs.c_str());
  std::fflush(stdout);
}

void PrintTotals(const std::map<std::string, std::map<std::string, Total>>& totals) {
  std::printf(
      "\n| role | points | fault | runs | failed | whole answers | lost calls | late calls | "
      "longest call "
      "s | back after at most s |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- "
      "|\n");
  Total all;
  for (const auto& [role, by_action] : totals) {
    for (const auto& [action, total] : by_action) {
      std::printf("| %s | %d | %s | %d | %d | %d | %d | %d | %.1f | %.1f |\n", role.c_str(),
                  total.points, action.c_str(), total.runs, total.failed, total.whole, total.lost,
                  total.late, total.longest_call, total.back);
      all.runs += total.runs;
      all.failed += total.failed;
    }
  }
  std::printf("\n%d runs, %d failed\n", all.runs, all.failed);
}

int RunAll(const Options& options) {
  std::map<std::string, std::vector<Reference>> references;
  std::map<std::string, std::map<std::string, Total>> totals;
  bool failed = false;
  for (const Point& point : AllPoints()) {
    if (!std::regex_search(point.name, options.points)) continue;
    for (const std::string& action : options.actions) {
      Total& total = totals[RoleOf(point)][action];
      ++total.points;
      for (int round = 0; round < options.rounds; ++round) {
        const Case one = MakeCase(point, action, options, round);
        std::vector<Reference>& wanted = references[one.checkpoint];
        if (wanted.empty()) wanted = MakeReferences(one.checkpoint);
        if (wanted.empty()) {
          std::printf("%s is not served even without a fault\n", one.checkpoint.c_str());
          return 1;
        }
        const auto begin = std::chrono::steady_clock::now();
        const Result result = RunCase(one, wanted);
        const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
        PrintRun(one, result, time.count());
        total.Add(result);
        failed |= !result.failures.empty();
      }
    }
  }
  if (totals.empty()) {
    std::printf("no such point\n");
    return 2;
  }
  PrintTotals(totals);
  return failed ? 1 : 0;
}

int Usage() {
  std::printf(
      "usage: kill_matrix [--points REGEX] [--actions kill,stop,term] [--seed N] [--rounds N]\n"
      "                   [--stop-seconds S] [--list]\n");
  return 2;
}

std::vector<std::string> Split(const std::string& text) {
  const std::regex word("[^,]+");
  return {std::sregex_token_iterator(text.begin(), text.end(), word), {}};
}

int Main(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); i += 2) {
    if (arguments[i] == "--list") {
      for (const Point& point : AllPoints()) std::printf("%s\n", point.name.c_str());
      return 0;
    }
    if (i + 1 == arguments.size()) return Usage();
    const std::string& value = arguments[i + 1];
    if (arguments[i] == "--points") {
      options.points = std::regex(value);
    } else if (arguments[i] == "--actions") {
      options.actions = Split(value);
    } else if (arguments[i] == "--seed") {
      options.seed = static_cast<unsigned>(std::atoi(value.c_str()));
    } else if (arguments[i] == "--rounds") {
      options.rounds = std::atoi(value.c_str());
    } else if (arguments[i] == "--stop-seconds") {
      options.stop_seconds = std::atof(value.c_str());
    } else {
      return Usage();
    }
  }
  return RunAll(options);
}

}  // namespace
}  // namespace sluice::kill_matrix

int main(int argc, char** argv) { return sluice::kill_matrix::Main({argv + 1, argv + argc}); }
