// Buffer owns 64-byte aligned host memory, zeroed at creation. Movable, not copyable.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace sluice {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);  // Ends the process when the system has no memory left.

  uint8_t* data() { return data_.get(); }
  const uint8_t* data() const { return data_.get(); }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(data_.get());
  }
  template <typename T>
  const T* as() const {
    return reinterpret_cast<const T*>(data_.get());
  }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(uint8_t* pointer) const;
  };
  std::unique_ptr<uint8_t, Free> data_;
  size_t size_ = 0;
};

}  // namespace sluice
