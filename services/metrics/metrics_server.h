// MetricsServer: an HTTP endpoint that Prometheus pulls: GET /metrics in its text format. One a
// process; the only place that knows how a page travels.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "services/metrics/page.h"

namespace sluice::metrics {

class MetricsServer {
 public:
  // Adds the samples of now. Called for each scrape, on a thread of the server, two at a time at
  // most: it must be thread-safe and must not wait for long.
  using Collect = std::function<void(Page* page)>;

  // Listens at once. `address`: "host:port", port 0: any; empty: no metrics, the result is nullptr.
  // UNAVAILABLE: the address cannot be bound. `collect` must live as long as the server.
  static absl::StatusOr<std::unique_ptr<MetricsServer>> Start(const std::string& address,
                                                              Collect collect);
  // Waits for scrapes that run.
  virtual ~MetricsServer() = default;

  virtual int port() const = 0;
  // "host:port" with the port that was chosen.
  virtual std::string address() const = 0;
};

}  // namespace sluice::metrics
