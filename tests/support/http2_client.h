// Http2Client: one HTTP/2 connection made by hand, for what a gRPC client would never send: floods
// of resets and pings, settings that are never acknowledged, windows that stay shut. Frames go out
// as they are asked for; what the server sends is read whenever the client writes or waits.
// One thread a client.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>

namespace sluice {

enum class FrameType : uint8_t {
  kData = 0,
  kHeaders = 1,
  kReset = 3,
  kSettings = 4,
  kPing = 6,
  kGoaway = 7,
  kWindowUpdate = 8,
  kContinuation = 9,
};

// One message as gRPC frames it inside DATA.
std::string GrpcMessage(const std::string& bytes, bool compressed = false);

class Http2Client {
 public:
  struct Options {
    std::string source = "127.0.0.1";  // Address to connect from: the peer that the server sees
    bool ack_settings = true;
    uint32_t stream_window = 65535;  // Bytes that the server may send on a stream
    bool reads = true;               // False: nothing is ever read from the socket
    std::string preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
  };
  // What came for a stream.
  struct Stream {
    std::string headers;  // HPACK blocks, one after the other; plain literals (no dynamic table)
    std::string data;
    bool ended = false;
    bool reset = false;
    int64_t send_window = 65535;
    // -1: no such trailer yet.
    int grpc_status() const;
    bool done() const { return ended || reset; }
  };

  // Connects to "host:port" and sends the preface and the settings.
  Http2Client(const std::string& address, const Options& options);
  Http2Client(const Http2Client&) = delete;
  Http2Client& operator=(const Http2Client&) = delete;
  ~Http2Client();

  bool open() const { return fd_ >= 0; }  // False: refused, or the server has closed it
  bool goaway() const { return goaway_; }
  uint32_t streams_opened() const { return (next_id_ - 1) / 2; }

  // Begins a call of a gRPC method, e.g. "/sluice.v1.GenerationService/Generate". `extra`: headers
  // besides those that gRPC wants.
  uint32_t OpenCall(const std::string& method,
                    const std::map<std::string, std::string>& extra = {});
  // One gRPC message; waits for the server's windows, at most 20 s. False: the stream has ended, or
  // no window came.
  bool SendMessage(uint32_t stream, const std::string& bytes, bool compressed = false,
                   bool last = true);
  void Reset(uint32_t stream);
  void Ping();
  // Lets the server send `bytes` more on the stream (0: on the connection).
  void Grant(uint32_t stream, uint32_t bytes);
  void SendFrame(FrameType type, uint8_t flags, uint32_t stream, const std::string& payload);

  // Writes what is waiting and reads until `pleased` or the connection has ended. False: neither in
  // `seconds`, a guard against a hang.
  bool ReadUntil(const std::function<bool()>& pleased, int seconds = 20);
  // Writes what is waiting. False: the connection has ended, or the server takes nothing for 20 s.
  bool Flush();

  const Stream& stream(uint32_t id) { return streams_[id]; }
  void Forget(uint32_t id) { streams_.erase(id); }

 private:
  bool Exchange(int timeout_ms);
  void TakeFrames();
  void TakeFrame(FrameType type, uint8_t flags, uint32_t stream, const std::string& payload);
  void Close();

  const Options options_;
  int fd_ = -1;
  uint32_t next_id_ = 1;
  std::string out_;
  std::string in_;
  std::map<uint32_t, Stream> streams_;
  int64_t connection_window_ = 65535;
  int64_t initial_window_ = 65535;
  bool goaway_ = false;
};

}  // namespace sluice
