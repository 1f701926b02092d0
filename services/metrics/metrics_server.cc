#include "services/metrics/metrics_server.h"

#include <netdb.h>
#include <prometheus/collectable.h>
#include <prometheus/exposer.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <exception>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace sluice::metrics {
namespace {

constexpr int kThreads = 2;
constexpr int kRequestTimeoutMs =
    5000;  // A client that sends or reads nothing for so long is ended
constexpr std::chrono::milliseconds kKnockEvery{10};

class CollectableFunction final : public prometheus::Collectable {
 public:
  explicit CollectableFunction(MetricsServer::Collect collect) : collect_(std::move(collect)) {}

  std::vector<prometheus::MetricFamily> Collect() const override {
    Page page;
    AddProcess(&page);
    collect_(&page);
    return page.Take();
  }

 private:
  const MetricsServer::Collect collect_;
};

// Connects once and hangs up. `host`: a numeric address, IPv6 in brackets.
void Knock(std::string host, int port) {
  if (!host.empty() && host.front() == '[') {
    host = host.substr(1, host.size() - 2);
  }
  addrinfo hints{};
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), absl::StrCat(port).c_str(), &hints, &found) != 0) {
    return;
  }
  const int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd >= 0) {
    (void)connect(fd, found->ai_addr, found->ai_addrlen);
    close(fd);
  }
  freeaddrinfo(found);
}

class HttpMetricsServer final : public MetricsServer {
 public:
  HttpMetricsServer(const std::string& address, Collect collect)
      : host_(address.substr(0, address.rfind(':'))),
        collectable_(std::make_shared<CollectableFunction>(std::move(collect))),
        exposer_(std::make_unique<prometheus::Exposer>(std::vector<std::string>{
            "listening_ports", address, "num_threads", absl::StrCat(kThreads), "request_timeout_ms",
            absl::StrCat(kRequestTimeoutMs)})),
        port_(exposer_->GetListeningPorts().at(0)) {
    exposer_->RegisterCollectable(collectable_);
  }

  // The library looks every 2 s whether it shall stop, or when somebody connects.
  ~HttpMetricsServer() override {
    const std::jthread knocker([this](const std::stop_token& stopped) {
      while (!stopped.stop_requested()) {
        Knock(host_, port_);
        std::this_thread::sleep_for(kKnockEvery);
      }
    });
    exposer_.reset();
  }

  int port() const override { return port_; }
  std::string address() const override { return absl::StrCat(host_, ":", port_); }

 private:
  const std::string host_;
  const std::shared_ptr<CollectableFunction> collectable_;
  std::unique_ptr<prometheus::Exposer> exposer_;  // Ends first: it calls the other
  const int port_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Start(const std::string& address,
                                                                    Collect collect) {
  if (address.empty()) {
    return nullptr;
  }
  if (address.rfind(':') == std::string::npos) {
    return absl::UnavailableError("--metrics-listen " + address +
                                  ": write host:port, e.g. 127.0.0.1:9400");
  }
  // The library's constructor throws; nothing thrown may leave this function.
  try {
    return std::make_unique<HttpMetricsServer>(address, std::move(collect));
  } catch (const std::exception& error) {
    return absl::UnavailableError(
        absl::StrCat("--metrics-listen ", address, ": cannot listen there (", error.what(),
                     "); write host:port with an IP address of this host and a free port"));
  }
}

}  // namespace sluice::metrics
