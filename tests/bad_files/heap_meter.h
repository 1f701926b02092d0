// HeapMeter: what the process takes from malloc (C++ and Rust) and reads with pread. The functions
// are replaced for the whole program, so this belongs into test programs only.
#pragma once

#include <cstdint>

namespace sluice::bad_files {

class HeapMeter {
 public:
  // Starts from what is in use now.
  HeapMeter();
  int64_t peak_bytes() const;  // Most bytes in use at once since then, over the start
  int64_t read_bytes() const;
  // False under a sanitizer, which brings its own malloc: everything is 0.
  static bool works();

 private:
  int64_t start_;
  int64_t read_start_;
};

}  // namespace sluice::bad_files
