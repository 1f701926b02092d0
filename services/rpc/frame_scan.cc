#include "services/rpc/frame_scan.h"

#include <algorithm>
#include <cmath>

namespace sluice::rpc {
namespace {

constexpr char kPreface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
constexpr size_t kPrefaceBytes = sizeof(kPreface) - 1;
constexpr size_t kHeadBytes = 9;
constexpr uint8_t kData = 0, kHeaders = 1, kReset = 3, kGoaway = 7, kWindowUpdate = 8,
                  kContinuation = 9;
constexpr uint8_t kEndStream = 1, kEndHeaders = 4;

}  // namespace

FrameScan::Time FrameScan::Bucket::Take(Time now) {
  const double seconds = std::chrono::duration<double>(now - filled).count();
  tokens = std::min(most, tokens + seconds * per_second) - 1;
  filled = now;
  const double debt = std::max(0.0, -tokens);
  return now + std::chrono::microseconds(std::lround(debt / per_second * 1e6));
}

FrameScan::FrameScan(const FrameLimits& limits, Time now)
    : limits_(limits),
      resets_{static_cast<double>(limits.resets), static_cast<double>(limits.resets),
              static_cast<double>(limits.resets_per_second), now},
      controls_{static_cast<double>(limits.controls), static_cast<double>(limits.controls),
                static_cast<double>(limits.controls_per_second), now} {}

FrameScan::Head FrameScan::Parse(const char* bytes) {
  const auto at = [bytes](int i) { return uint32_t{static_cast<uint8_t>(bytes[i])}; };
  Head head;
  head.length = at(0) << 16 | at(1) << 8 | at(2);
  head.type = static_cast<uint8_t>(at(3));
  head.flags = static_cast<uint8_t>(at(4));
  head.stream = (at(5) << 24 | at(6) << 16 | at(7) << 8 | at(8)) & 0x7fffffffu;
  return head;
}

FrameScan::Verdict FrameScan::End(const char* reason) {
  reason_ = reason;
  return Verdict::kEnd;
}

FrameScan::Verdict FrameScan::Greet(std::string* in, std::string* out) {
  const size_t got = std::min(in->size(), kPrefaceBytes);
  if (in->compare(0, got, kPreface, got) != 0) {
    return End("no HTTP/2");
  }
  if (got == kPrefaceBytes) {
    greeted_ = true;
    out->append(*in, 0, kPrefaceBytes);
    in->erase(0, kPrefaceBytes);
  }
  return Verdict::kGoOn;
}

FrameScan::Verdict FrameScan::FromClient(Time now, std::string* in, std::string* out) {
  if (!greeted_) {
    const Verdict verdict = Greet(in, out);
    if (!greeted_) {
      return verdict;
    }
  }
  size_t passed = 0;
  Verdict verdict = Verdict::kGoOn;
  while (verdict == Verdict::kGoOn && passed < in->size()) {
    if (client_left_ > 0) {
      const size_t part = std::min<size_t>(client_left_, in->size() - passed);
      client_left_ -= static_cast<uint32_t>(part);
      passed += part;
    } else if (in->size() - passed >= kHeadBytes) {
      const Head head = Parse(in->data() + passed);
      verdict = Judge(now, head);
      if (verdict == Verdict::kGoOn) {
        client_left_ = head.length;
        passed += kHeadBytes;
      }
    } else {
      break;
    }
  }
  out->append(*in, 0, passed);
  in->erase(0, passed);
  return verdict;
}

FrameScan::Verdict FrameScan::Judge(Time now, const Head& head) {
  if (now < wait_until_) {
    return Verdict::kWait;
  }
  if (in_headers_ && head.type != kContinuation) {
    return End("a header block is interrupted");
  }
  switch (head.type) {
    case kHeaders:
    case kContinuation:
      return OnHeaders(head);
    case kReset:
      if (open_.erase(head.stream) != 0) {
        wait_until_ = std::max(wait_until_, resets_.Take(now));
      }
      return Verdict::kGoOn;
    case kData:
      if (head.length > 0 || (head.flags & kEndStream) != 0) {
        return Verdict::kGoOn;
      }
      break;
    case kWindowUpdate:
    case kGoaway:
      return Verdict::kGoOn;
    default:
      break;
  }
  wait_until_ = std::max(wait_until_, controls_.Take(now));
  return Verdict::kGoOn;
}

FrameScan::Verdict FrameScan::OnHeaders(const Head& head) {
  if (in_headers_ != (head.type == kContinuation)) {
    return End("a header block is interrupted");
  }
  header_bytes_ = in_headers_ ? header_bytes_ + head.length : head.length;
  if (header_bytes_ > limits_.header_bytes) {
    return End("a header block is too large");
  }
  in_headers_ = (head.flags & kEndHeaders) == 0;
  if (head.type == kHeaders && head.stream > last_stream_) {
    last_stream_ = head.stream;
    open_.insert(head.stream);
    if (open_.size() > limits_.max_streams) {
      return End("too many streams at once");
    }
  }
  return Verdict::kGoOn;
}

void FrameScan::FromServer(const char* bytes, size_t size) {
  while (size > 0) {
    if (server_left_ > 0) {
      const size_t part = std::min<size_t>(server_left_, size);
      server_left_ -= static_cast<uint32_t>(part);
      bytes += part;
      size -= part;
      continue;
    }
    const size_t part = std::min(kHeadBytes - server_head_.size(), size);
    server_head_.append(bytes, part);
    bytes += part;
    size -= part;
    if (server_head_.size() == kHeadBytes) {
      const Head head = Parse(server_head_.data());
      server_head_.clear();
      server_left_ = head.length;
      controls_.tokens = std::min(controls_.most, controls_.tokens + 1);
      const bool ends = (head.type == kHeaders || head.type == kData) && (head.flags & kEndStream);
      if (ends || head.type == kReset) {
        open_.erase(head.stream);
      }
    }
  }
}

}  // namespace sluice::rpc
