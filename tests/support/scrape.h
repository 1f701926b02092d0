// Scrape: one GET /metrics of a live endpoint, over a socket of its own, read as Prometheus reads
// it.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <map>
#include <sstream>
#include <string>

namespace sluice {

struct Scrape {
  int status = 0;                            // Of HTTP; 0: no answer
  std::map<std::string, std::string> types;  // Name -> "counter", "gauge", "histogram", "summary"
  std::map<std::string, std::string> helps;
  std::map<std::string, double> samples;  // name{label="value",...} as written

  // The value of a sample; -1: it is not there.
  double Value(const std::string& sample) const {
    const auto it = samples.find(sample);
    return it == samples.end() ? -1 : it->second;
  }
};

// The whole answer; empty: nobody listens.
inline std::string HttpGet(int port, const std::string& path) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::string answer;
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
    const std::string request = "GET " + path + " HTTP/1.0\r\nHost: localhost\r\n\r\n";
    if (send(fd, request.data(), request.size(), MSG_NOSIGNAL) >= 0) {
      char piece[4096];
      for (ssize_t n = 0; (n = recv(fd, piece, sizeof(piece), 0)) > 0;) {
        answer.append(piece, static_cast<size_t>(n));
      }
    }
  }
  close(fd);
  return answer;
}

inline Scrape ScrapeMetrics(int port) {
  Scrape scrape;
  std::istringstream answer(HttpGet(port, "/metrics"));
  std::string line, word;
  answer >> word >> scrape.status;
  while (std::getline(answer, line) && line != "\r") {
  }
  while (std::getline(answer, line)) {
    std::istringstream fields(line);
    std::string name;
    if (line.rfind("# TYPE ", 0) == 0) {
      fields >> word >> word >> name;
      fields >> scrape.types[name];
    } else if (line.rfind("# HELP ", 0) == 0) {
      fields >> word >> word >> name;
      std::getline(fields >> std::ws, scrape.helps[name]);
    } else if (const size_t space = line.rfind(' '); space != std::string::npos) {
      scrape.samples[line.substr(0, space)] = std::stod(line.substr(space + 1));
    }
  }
  return scrape;
}

}  // namespace sluice
