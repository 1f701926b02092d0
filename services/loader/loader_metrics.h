// What the loader counts, and how a scrape shows it.
#pragma once

#include <string>

#include "services/metrics/page.h"

namespace sluice::loader {

// Seconds to read and convert a tensor: from a small projection to a large table on a slow disk.
inline constexpr double kConversionBounds[] = {.001, .0025, .005, .01, .025, .05, .1,
                                               .25,  .5,    1,    2.5, 5,    10,  30};

// Thread-safe.
struct LoaderMetrics {
  metrics::Counter tensor_bytes;  // Sent by Fetch
  metrics::Counter file_bytes;    // Sent by FetchFile
  metrics::Counter converted_bytes;
  metrics::Histogram conversion_seconds{kConversionBounds};  // A sample for each tensor

  // `streams`: Fetch and FetchFile calls that live now.
  void Collect(const std::string& model_name, int streams, metrics::Page* page) const;
};

}  // namespace sluice::loader
