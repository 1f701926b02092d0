// Early return on an error, for functions that return absl::Status or absl::StatusOr<T>.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define SLUICE_CONCAT_INNER(a, b) a##b
#define SLUICE_CONCAT(a, b) SLUICE_CONCAT_INNER(a, b)

// Returns the status of `expression` from the enclosing function when it is not OK.
#define SLUICE_RETURN_IF_ERROR(expression)                    \
  do {                                                        \
    if (absl::Status status_ = (expression); !status_.ok()) { \
      return status_;                                         \
    }                                                         \
  } while (false)

// SLUICE_ASSIGN_OR_RETURN(auto x, F()): x takes the value of F(), or the function returns F()'s
// status.
#define SLUICE_ASSIGN_OR_RETURN(declaration, expression) \
  SLUICE_ASSIGN_OR_RETURN_INNER(SLUICE_CONCAT(status_or_, __LINE__), declaration, expression)
#define SLUICE_ASSIGN_OR_RETURN_INNER(name, declaration, expression) \
  auto name = (expression);                                          \
  if (!name.ok()) {                                                  \
    return std::move(name).status();                                 \
  }                                                                  \
  declaration = *std::move(name)
