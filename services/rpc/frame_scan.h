// FrameScan: what a client may do on one HTTP/2 connection, judged by the heads of the frames alone
// (9 bytes each) as they pass. Pure: no sockets, no clock of its own. gRPC 1.51 bounds none of this
// for a client that never acknowledges its settings, and starts a handler for each stream of a reset
// flood.
#pragma once

#include <chrono>
#include <cstdint>
#include <set>
#include <string>

namespace sluice::rpc {

struct FrameLimits {
  uint32_t max_streams = 100;        // Open at once; the connection ends at one more
  uint32_t header_bytes = 16384;     // Of one header block, as on the wire; likewise
  uint32_t resets = 200;             // Streams given up by the client: so many at once,
  uint32_t resets_per_second = 100;  // and so many more each second; the rest wait
  // The same for pings, settings, priorities and empty data. Each frame of the server adds one:
  // clients measure a connection by pings while answers come.
  uint32_t controls = 400;
  uint32_t controls_per_second = 100;
};

class FrameScan {
 public:
  using Time = std::chrono::steady_clock::time_point;
  enum class Verdict { kGoOn, kWait, kEnd };

  FrameScan(const FrameLimits& limits, Time now);

  // Takes bytes of the client off the front of `in` and appends those that may pass to `out`. What
  // stays in `in` is half a head (kGoOn), or must wait until wait_until(). The frame that breaks a
  // rate passes, since it gives work up; those behind it wait.
  // kEnd: the client breaks a limit or does not speak HTTP/2; reason() says which.
  Verdict FromClient(Time now, std::string* in, std::string* out);
  // Looks at bytes of the server, which all pass.
  void FromServer(const char* bytes, size_t size);

  Time wait_until() const { return wait_until_; }
  bool greeted() const { return greeted_; }  // The client's preface was whole
  const char* reason() const { return reason_; }
  size_t open_streams() const { return open_.size(); }

 private:
  struct Head {
    uint32_t length = 0;
    uint8_t type = 0;
    uint8_t flags = 0;
    uint32_t stream = 0;
  };
  // Tokens that come back with time.
  struct Bucket {
    double tokens;
    double most;
    double per_second;
    Time filled;
    // Takes one in any case; now, or when the debt is paid.
    Time Take(Time now);
  };
  static Head Parse(const char* bytes);
  Verdict Greet(std::string* in, std::string* out);
  Verdict Judge(Time now, const Head& head);
  Verdict OnHeaders(const Head& head);
  Verdict End(const char* reason);

  const FrameLimits limits_;
  Bucket resets_;
  Bucket controls_;
  bool greeted_ = false;
  const char* reason_ = "";
  Time wait_until_{};
  std::set<uint32_t> open_;    // Streams that neither side has ended
  uint32_t last_stream_ = 0;   // Highest of the client
  uint32_t client_left_ = 0;   // Payload of the current frame that is to come
  uint64_t header_bytes_ = 0;  // Of the header block that is being sent
  bool in_headers_ = false;
  std::string server_head_;  // Beginning of a head
  uint32_t server_left_ = 0;
};

}  // namespace sluice::rpc
