// Page: what one scrape gets: families of one name, help text and type, each with samples that
// differ in their labels. Made anew for each scrape, by one thread.
#pragma once

#include <prometheus/metric_family.h>

#include <string>
#include <utility>
#include <vector>

#include "services/metrics/instruments.h"

namespace sluice::metrics {

using Labels = std::vector<std::pair<std::string, std::string>>;

class Page {
 public:
  // Put into the labels of every sample that is added later.
  void set_common_labels(const Labels& labels) { common_ = labels; }

  // `name`: with its unit; of a counter it ends in _total. A name that is there already gets one
  // more sample. The help text of the first one counts.
  void AddCounter(const std::string& name, const std::string& help, double value,
                  const Labels& labels = {});
  void AddGauge(const std::string& name, const std::string& help, double value,
                const Labels& labels = {});
  void AddHistogram(const std::string& name, const std::string& help, const Histogram& histogram,
                    const Labels& labels = {});

  std::vector<prometheus::MetricFamily> Take() { return std::move(families_); }

 private:
  // A new sample of a family, with its labels.
  prometheus::ClientMetric& Add(const std::string& name, const std::string& help,
                                prometheus::MetricType type, const Labels& labels);

  Labels common_;
  std::vector<prometheus::MetricFamily> families_;
};

// CPU time, memory, open files and start time of this process, under the names that Prometheus
// gives them in every language.
void AddProcess(Page* page);

}  // namespace sluice::metrics
