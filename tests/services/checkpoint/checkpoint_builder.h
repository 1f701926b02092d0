// Small hand-made checkpoints for tests: files in a temporary folder, tensors and keys given byte
// by byte, so that a test can break any of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/json.h"

namespace sluice::checkpoint {

// A folder that is removed with its content at the end.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }
  void Write(const std::string& name, const std::string& content) const;
  // One byte of a file that is there.
  void Overwrite(const std::string& name, size_t at, char byte) const;

 private:
  std::string path_;
};

// The bytes of numbers, little-endian.
template <typename T>
std::string Bytes(const std::vector<T>& values) {
  std::string bytes(values.size() * sizeof(T), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}
template <typename T>
std::string Repeat(T value, size_t count) {
  return Bytes(std::vector<T>(count, value));
}

struct BuiltTensor {
  std::string dtype;
  std::vector<uint64_t> shape;
  std::string data;
};
using TensorMap = std::map<std::string, BuiltTensor>;

// A safetensors file: `header` as it is, or made from tensors.
std::string SafetensorsFile(const std::string& header, const std::string& data);
std::string SafetensorsFile(const TensorMap& tensors);

// A folder with config.json and model.safetensors. Starts as a whole, unquantized float16 model of
// random weights: Llama with hidden 32, 2 heads, 1 kv head, ffn 64, vocabulary 8, 1 layer; or OPT
// with hidden 16, 2 heads, ffn 32.
struct TinyModel {
  Json config;
  TensorMap tensors;

  static TinyModel Llama();
  static TinyModel Opt();

  // Replaces `name`.weight of layer 0 (a linear) by the given parts ("qweight", "weight.absmax",
  // ...).
  void Quantize(const std::string& name, const TensorMap& parts);
  void Write(const TempDir& dir) const;
  // Writes and opens.
  absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const TempDir& dir) const;
};

// Reads a tensor by its canonical name.
absl::StatusOr<QuantizedMatrix> ReadNamed(const Checkpoint& checkpoint, const std::string& name);
// All rows, one after the other, as float.
std::vector<float> Dequantize(const QuantizedMatrix& matrix);

// A GGUF file, built key by key and tensor by tensor; the setters replace an earlier entry of that
// name.
class GgufBuilder {
 public:
  // Llama: hidden 32, 2 heads of 16, 1 kv head, ffn 64, vocabulary 8, 1 layer, F32 weights.
  static GgufBuilder Llama();

  void Text(const std::string& key, const std::string& value);
  void U32(const std::string& key, uint32_t value);
  void F32(const std::string& key, float value);
  void Flag(const std::string& key, bool value);
  void Texts(const std::string& key, const std::vector<std::string>& values);
  void Floats(const std::string& key, const std::vector<float>& values);
  void Ints(const std::string& key, const std::vector<int32_t>& values);
  // Type and value as they lie in the file.
  void Raw(const std::string& key, uint32_t type, const std::string& value);
  void RemoveKey(const std::string& key) { keys_.erase(key); }
  // `dims`: fastest first, as in the file.
  void Tensor(const std::string& name, uint32_t type, const std::vector<uint64_t>& dims,
              const std::string& data);
  void RemoveTensor(const std::string& name) { tensors_.erase(name); }

  // The file; `header_bytes`, when given, takes the length of everything before the data.
  std::string Build(size_t* header_bytes = nullptr) const;
  absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const TempDir& dir) const;

  uint32_t version = 3;
  uint64_t alignment = 32;          // Used for the layout; the key is written only by U32().
  uint64_t extra_tensor_count = 0;  // Added to the counts in the header.
  uint64_t extra_key_count = 0;

 private:
  struct Info {
    uint32_t type;
    std::vector<uint64_t> dims;
    std::string data;
  };
  std::map<std::string, std::string> keys_;  // Type and value.
  std::map<std::string, Info> tensors_;
};

}  // namespace sluice::checkpoint
