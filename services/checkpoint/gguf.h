// Reading of GGUF files, version 2 and 3, little-endian:
//
//   "GGUF", u32 version, u64 tensors, u64 keys
//   keys:    string name, u32 type, value
//            string = u64 length + bytes; array = u32 type, u64 count, values
//   tensors: string name, u32 dims, u64 dims[], u32 type, u64 offset; dims[0] is the fastest (columns)
//   data:    from the next multiple of general.alignment (32), each tensor from a multiple of it
//
// Caps: header 32 MB, 32 MiB of values in memory, 100,000 tensors and keys, key names 256 bytes,
// tensor names 512, strings 4 MB,
// 4,000,000 array elements. Values are read by typed accessors: a value of another type than
// asked for is an error, never cast.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "services/checkpoint/file.h"
#include "services/checkpoint/source_dtype.h"

namespace sluice::checkpoint {

enum class GgufType : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64
};

// One value, in the member that suits its type.
struct GgufValue {
  GgufType type = GgufType::kU8;
  GgufType element = GgufType::kU8;  // kArray only.
  uint64_t bits = 0;  // Numbers: unsigned and bool as they are, signed extended to 64 bits.
  double number = 0;  // kF32, kF64.
  std::string text;
  std::vector<std::string> texts;  // Array of strings.
  std::vector<int64_t> integers;   // Array of integers or bools.
  std::vector<float> floats;       // Array of kF32 or kF64.
};

struct GgufTensor {
  std::string name;
  SourceDType dtype;
  Shape shape;  // Slowest first: [rows, columns].
  uint64_t bytes = 0;
  uint64_t offset = 0;  // From the start of the file.
};

class GgufFile {
 public:
  // INVALID_ARGUMENT for a broken file, UNIMPLEMENTED for version 1, big-endian files and tensor
  // types by name.
  static absl::StatusOr<GgufFile> Open(std::unique_ptr<File> file);

  const File& file() const { return *file_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }
  const GgufTensor* Find(const std::string& name) const;
  // Hash of the header's bytes, for the model's digest.
  const std::string& header_hash() const { return header_hash_; }

  bool Has(const std::string& key) const { return values_.contains(key); }
  // INVALID_ARGUMENT, naming the key, when it is absent, of another type or out of lo..hi.
  absl::StatusOr<uint64_t> Uint(const std::string& key, uint64_t lo, uint64_t hi) const;
  absl::StatusOr<double> Double(const std::string& key, double lo, double hi) const;
  absl::StatusOr<bool> Bool(const std::string& key) const;
  absl::StatusOr<std::string> Text(const std::string& key) const;
  // Null with an error as above; else valid as long as this object.
  absl::StatusOr<const std::vector<std::string>*> Texts(const std::string& key) const;
  absl::StatusOr<const std::vector<int64_t>*> Integers(const std::string& key) const;
  absl::StatusOr<const std::vector<float>*> Floats(const std::string& key) const;

  // Frees the values of keys that begin with `prefix`.
  void Drop(const std::string& prefix);

 private:
  friend class GgufParser;
  absl::StatusOr<const GgufValue*> Value(const std::string& key) const;

  std::unique_ptr<File> file_;
  absl::flat_hash_map<std::string, GgufValue> values_;
  std::vector<GgufTensor> tensors_;
  absl::flat_hash_map<std::string, size_t> by_name_;
  std::string header_hash_;
};

}  // namespace sluice::checkpoint
