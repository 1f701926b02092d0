#include "tests/support/http2_client.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>

namespace sluice {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint8_t kEndStream = 1, kAck = 1, kEndHeaders = 4, kPadded = 8;
constexpr size_t kMostFrame = 16384;
constexpr int kGuardSeconds = 20;

std::string BigEndian(uint64_t value, int bytes) {
  std::string text;
  for (int i = bytes - 1; i >= 0; --i) text.push_back(static_cast<char>(value >> (8 * i)));
  return text;
}

uint64_t FromBigEndian(const std::string& text, size_t at, int bytes) {
  uint64_t value = 0;
  for (int i = 0; i < bytes; ++i) value = value << 8 | static_cast<uint8_t>(text[at + i]);
  return value;
}

// HPACK: an integer behind a prefix of 7 bits, a string without Huffman code.
std::string HpackString(const std::string& text) {
  std::string out;
  size_t length = text.size();
  if (length < 127) {
    out.push_back(static_cast<char>(length));
  } else {
    out.push_back(127);
    for (length -= 127; length >= 128; length >>= 7) {
      out.push_back(static_cast<char>(length % 128 + 128));
    }
    out.push_back(static_cast<char>(length));
  }
  return out + text;
}

// A literal that is not indexed, with a new name.
std::string Header(const std::string& name, const std::string& value) {
  return std::string(1, 0) + HpackString(name) + HpackString(value);
}

std::string Setting(uint16_t id, uint32_t value) { return BigEndian(id, 2) + BigEndian(value, 4); }

int Connect(const std::string& address, const std::string& source) {
  const size_t colon = address.rfind(':');
  sockaddr_in to{}, from{};
  to.sin_family = from.sin_family = AF_INET;
  to.sin_port = htons(static_cast<uint16_t>(std::atoi(address.c_str() + colon + 1)));
  inet_pton(AF_INET, address.substr(0, colon).c_str(), &to.sin_addr);
  inet_pton(AF_INET, source.c_str(), &from.sin_addr);
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  if (bind(fd, reinterpret_cast<sockaddr*>(&from), sizeof(from)) != 0 ||
      connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)) != 0) {
    close(fd);
    return -1;
  }
  fcntl(fd, F_SETFL, O_NONBLOCK);
  return fd;
}

}  // namespace

std::string GrpcMessage(const std::string& bytes, bool compressed) {
  return std::string(1, compressed ? 1 : 0) + BigEndian(bytes.size(), 4) + bytes;
}

int Http2Client::Stream::grpc_status() const {
  const std::string name = "grpc-status";
  const size_t at = headers.find(name);
  if (at == std::string::npos || at + name.size() + 1 >= headers.size()) return -1;
  const int length = headers[at + name.size()];
  return std::atoi(headers.substr(at + name.size() + 1, static_cast<size_t>(length)).c_str());
}

Http2Client::Http2Client(const std::string& address, const Options& options) : options_(options) {
  fd_ = Connect(address, options.source);
  out_ = options.preface;
  SendFrame(FrameType::kSettings, 0, 0,
            Setting(1, 0) + Setting(4, options.stream_window));  // No dynamic table
}

Http2Client::~Http2Client() { Close(); }

void Http2Client::Close() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

uint32_t Http2Client::OpenCall(const std::string& method,
                               const std::map<std::string, std::string>& extra) {
  const uint32_t id = next_id_;
  next_id_ += 2;
  streams_[id].send_window = initial_window_;
  std::string block = Header(":method", "POST") + Header(":scheme", "http") +
                      Header(":path", method) + Header(":authority", "sluice") +
                      Header("te", "trailers") + Header("content-type", "application/grpc");
  for (const auto& [name, value] : extra) block += Header(name, value);
  SendFrame(FrameType::kHeaders, block.size() > kMostFrame ? 0 : kEndHeaders, id,
            block.substr(0, kMostFrame));
  for (size_t at = kMostFrame; at < block.size(); at += kMostFrame) {
    SendFrame(FrameType::kContinuation, at + kMostFrame >= block.size() ? kEndHeaders : 0, id,
              block.substr(at, kMostFrame));
  }
  return id;
}

bool Http2Client::SendMessage(uint32_t stream, const std::string& bytes, bool compressed,
                              bool last) {
  const std::string message = GrpcMessage(bytes, compressed);
  Stream& target = streams_[stream];
  for (size_t at = 0; at < message.size();) {
    const auto has_window = [&] {
      return target.done() || (target.send_window > 0 && connection_window_ > 0);
    };
    if (!has_window() && !ReadUntil(has_window)) return false;
    if (target.done() || !open()) return false;
    const auto most = static_cast<size_t>(std::min(target.send_window, connection_window_));
    const std::string piece = message.substr(at, std::min(most, kMostFrame));
    at += piece.size();
    target.send_window -= static_cast<int64_t>(piece.size());
    connection_window_ -= static_cast<int64_t>(piece.size());
    SendFrame(FrameType::kData, last && at == message.size() ? kEndStream : 0, stream, piece);
  }
  return Flush();
}

void Http2Client::Reset(uint32_t stream) {
  SendFrame(FrameType::kReset, 0, stream, BigEndian(8, 4));
}

void Http2Client::Ping() { SendFrame(FrameType::kPing, 0, 0, "12345678"); }

void Http2Client::Grant(uint32_t stream, uint32_t bytes) {
  SendFrame(FrameType::kWindowUpdate, 0, stream, BigEndian(bytes, 4));
}

void Http2Client::SendFrame(FrameType type, uint8_t flags, uint32_t stream,
                            const std::string& payload) {
  out_ += BigEndian(payload.size(), 3);
  out_.push_back(static_cast<char>(type));
  out_.push_back(static_cast<char>(flags));
  out_ += BigEndian(stream, 4) + payload;
}

bool Http2Client::Flush() {
  auto end = Clock::now() + std::chrono::seconds(kGuardSeconds);
  while (open() && !out_.empty() && Clock::now() < end) {
    const size_t before = out_.size();
    Exchange(100);
    if (out_.size() < before) end = Clock::now() + std::chrono::seconds(kGuardSeconds);
  }
  return open() && out_.empty();
}

bool Http2Client::ReadUntil(const std::function<bool()>& pleased, int seconds) {
  const auto end = Clock::now() + std::chrono::seconds(seconds);
  while (!pleased() && open()) {
    if (Clock::now() >= end) return false;
    Exchange(100);
  }
  return true;
}

// Writes and reads once, as much as can be without waiting longer than `timeout_ms`.
bool Http2Client::Exchange(int timeout_ms) {
  pollfd socket = {fd_, 0, 0};
  if (!out_.empty()) socket.events |= POLLOUT;
  if (options_.reads) socket.events |= POLLIN;
  if (poll(&socket, 1, timeout_ms) <= 0) return false;
  if ((socket.revents & POLLOUT) != 0) {
    const ssize_t sent = send(fd_, out_.data(), out_.size(), MSG_NOSIGNAL);
    if (sent > 0) out_.erase(0, static_cast<size_t>(sent));
    if (sent < 0 && errno != EAGAIN) return Close(), false;
  }
  if ((socket.revents & (POLLIN | POLLHUP | POLLERR)) != 0) {
    char buffer[65536];
    const ssize_t got = recv(fd_, buffer, sizeof(buffer), 0);
    if (got > 0) in_.append(buffer, static_cast<size_t>(got));
    if (got == 0 || (got < 0 && errno != EAGAIN)) Close();
    TakeFrames();
  }
  return true;
}

void Http2Client::TakeFrames() {
  size_t at = 0;
  while (in_.size() - at >= 9) {
    const size_t length = FromBigEndian(in_, at, 3);
    if (in_.size() - at < 9 + length) break;
    TakeFrame(static_cast<FrameType>(in_[at + 3]), static_cast<uint8_t>(in_[at + 4]),
              static_cast<uint32_t>(FromBigEndian(in_, at + 5, 4)) & 0x7fffffffu,
              in_.substr(at + 9, length));
    at += 9 + length;
  }
  in_.erase(0, at);
}

void Http2Client::TakeFrame(FrameType type, uint8_t flags, uint32_t stream,
                            const std::string& payload) {
  const auto known = streams_.find(stream);
  Stream* target = known == streams_.end() ? nullptr : &known->second;
  if (type == FrameType::kSettings && (flags & kAck) == 0) {
    for (size_t at = 0; at + 6 <= payload.size(); at += 6) {
      if (FromBigEndian(payload, at, 2) != 4) continue;
      const auto window = static_cast<int64_t>(FromBigEndian(payload, at + 2, 4));
      for (auto& [id, open] : streams_) open.send_window += window - initial_window_;
      initial_window_ = window;
    }
    if (options_.ack_settings) SendFrame(FrameType::kSettings, kAck, 0, "");
  } else if (type == FrameType::kWindowUpdate) {
    const auto more = static_cast<int64_t>(FromBigEndian(payload, 0, 4));
    if (stream == 0) connection_window_ += more;
    if (target != nullptr) target->send_window += more;
  } else if (type == FrameType::kPing && (flags & kAck) == 0) {
    SendFrame(FrameType::kPing, kAck, 0, payload);
  } else if (type == FrameType::kGoaway) {
    goaway_ = true;
  } else if (target != nullptr && type == FrameType::kReset) {
    target->reset = true;
  } else if (target != nullptr && (type == FrameType::kHeaders || type == FrameType::kData)) {
    std::string& content = type == FrameType::kHeaders ? target->headers : target->data;
    content += (flags & kPadded) == 0 ? payload : payload.substr(1);
    target->ended |= (flags & kEndStream) != 0;
  }
}

}  // namespace sluice
