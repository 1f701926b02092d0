#include "services/loader/loader_metrics.h"

namespace sluice::loader {

void LoaderMetrics::Collect(const std::string& model_name, int streams, metrics::Page* page) const {
  page->set_common_labels({{"model_name", model_name}});
  const char served[] = "Bytes sent to workers and controllers, of tensors and of files.";
  page->AddCounter("sluice_loader_served_bytes_total", served,
                   static_cast<double>(tensor_bytes.value()), {{"kind", "tensor"}});
  page->AddCounter("sluice_loader_served_bytes_total", served,
                   static_cast<double>(file_bytes.value()), {{"kind", "file"}});
  page->AddCounter("sluice_loader_converted_bytes_total",
                   "Bytes of quantized tensors converted to canonical form.",
                   static_cast<double>(converted_bytes.value()));
  page->AddHistogram("sluice_loader_conversion_seconds",
                     "Time to read a quantized tensor and convert it to canonical form.",
                     conversion_seconds);
  page->AddGauge("sluice_loader_streams", "Streams of tensors and files that are open.", streams);
}

}  // namespace sluice::loader
