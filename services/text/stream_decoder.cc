#include <memory>
#include <string>

#include "services/text/abi_buffers.h"
#include "services/text/tokenizer.h"
#include "services/text/tokenizer_impl.h"

namespace sluice::text {

// The state is on the Rust side (src/stream.rs), where the tokenizer's decoder is known.
struct StreamDecoder::Impl {
  explicit Impl(SluiceTextStream* opened) : stream(opened) {}
  ~Impl() { sluice_text_free_stream(stream); }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  SluiceTextStream* stream;
};

StreamDecoder::StreamDecoder(const Tokenizer* tokenizer, bool skip_special_tokens)
    : impl_(std::make_unique<Impl>(
          sluice_text_new_stream(tokenizer->impl_->model, skip_special_tokens))) {}
StreamDecoder::~StreamDecoder() = default;
StreamDecoder::StreamDecoder(StreamDecoder&&) noexcept = default;
StreamDecoder& StreamDecoder::operator=(StreamDecoder&&) noexcept = default;

std::string StreamDecoder::Add(uint32_t id) {
  return Take(sluice_text_stream_add(impl_->stream, id));
}

std::string StreamDecoder::Finish() { return Take(sluice_text_stream_finish(impl_->stream)); }

}  // namespace sluice::text
