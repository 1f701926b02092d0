#include "services/metrics/page.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <limits>
#include <utility>

namespace sluice::metrics {
namespace {

// Set before main().
const double kStarted = static_cast<double>(std::time(nullptr));

double Seconds(const timeval& time) {
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
}

double ResidentBytes() {
  std::ifstream file("/proc/self/statm");
  double pages = 0, resident = 0;
  file >> pages >> resident;
  return resident * static_cast<double>(sysconf(_SC_PAGESIZE));
}

double OpenFiles() {
  std::error_code error;
  double files = 0;
  for (std::filesystem::directory_iterator it("/proc/self/fd", error), end; !error && it != end;
       it.increment(error)) {
    ++files;
  }
  return std::max(0.0, files - 1);  // Without the one that reads the folder
}

}  // namespace

prometheus::ClientMetric& Page::Add(const std::string& name, const std::string& help,
                                    prometheus::MetricType type, const Labels& labels) {
  auto family = std::find_if(families_.begin(), families_.end(),
                             [&](const auto& other) { return other.name == name; });
  if (family == families_.end()) {
    family = families_.insert(families_.end(), {name, help, type, {}});
  }
  prometheus::ClientMetric& metric = family->metric.emplace_back();
  for (const Labels* some : {&std::as_const(common_), &labels}) {
    for (const auto& [key, value] : *some) {
      metric.label.push_back({key, value});
    }
  }
  return metric;
}

void Page::AddCounter(const std::string& name, const std::string& help, double value,
                      const Labels& labels) {
  Add(name, help, prometheus::MetricType::Counter, labels).counter.value = value;
}

void Page::AddGauge(const std::string& name, const std::string& help, double value,
                    const Labels& labels) {
  Add(name, help, prometheus::MetricType::Gauge, labels).gauge.value = value;
}

void Page::AddHistogram(const std::string& name, const std::string& help,
                        const Histogram& histogram, const Labels& labels) {
  auto& sample = Add(name, help, prometheus::MetricType::Histogram, labels).histogram;
  const std::vector<uint64_t> counts = histogram.counts();
  for (size_t i = 0; i < counts.size(); ++i) {
    sample.sample_count += counts[i];
    const bool last = i == histogram.bounds().size();
    sample.bucket.push_back({sample.sample_count, last ? std::numeric_limits<double>::infinity()
                                                       : histogram.bounds()[i]});
  }
  sample.sample_sum = histogram.sum();
}

void AddProcess(Page* page) {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  page->AddCounter("process_cpu_seconds_total", "CPU time, user and system, in seconds.",
                   Seconds(usage.ru_utime) + Seconds(usage.ru_stime));
  page->AddGauge("process_resident_memory_bytes", "Resident memory in bytes.", ResidentBytes());
  page->AddGauge("process_open_fds", "Open file descriptors.", OpenFiles());
  page->AddGauge("process_start_time_seconds",
                 "Start of the process since the Unix epoch, in seconds.", kStarted);
}

}  // namespace sluice::metrics
