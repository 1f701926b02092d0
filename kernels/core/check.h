// SLUICE_CHECK(condition) << "text": ends the process with file, line and text when a programmer's
// rule is broken. Only for our own bugs (a wrong shape from our code); bad input, files and peers
// get an absl::Status.
#pragma once

#include <sstream>

namespace sluice::internal {

class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const char* condition);
  CheckFailure(const CheckFailure&) = delete;
  CheckFailure& operator=(const CheckFailure&) = delete;
  [[noreturn]] ~CheckFailure();  // Prints the message to stderr and aborts.
  std::ostream& stream() { return stream_; }

 private:
  std::ostringstream stream_;
};

}  // namespace sluice::internal

#define SLUICE_CHECK(condition) \
  if (condition) {              \
  } else                        \
    ::sluice::internal::CheckFailure(__FILE__, __LINE__, #condition).stream()
