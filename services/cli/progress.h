// What people see while a cluster becomes ready: one line, and a bar.
#pragma once

#include <cstdio>
#include <string>

#include "proto/sluice/v1/admin.pb.h"

namespace sluice::cli {

// E.g. "[########            ]  40%  loading: worker-0 48%, worker-1 32%" or "waiting for workers:
// 1 of 2 attached". At most `width` columns.
std::string ProgressLine(const v1::GetClusterResponse& cluster, int width);

// "[######                  ]  25%".
std::string ProgressBar(int percent);

// Draws lines over each other on a terminal; elsewhere writes a line only when it says something
// new.
class ProgressDisplay {
 public:
  // `out` must outlive it.
  explicit ProgressDisplay(FILE* out);
  ~ProgressDisplay() { Clear(); }

  void Show(const std::string& line);
  // A line that stays.
  void Note(const std::string& line);
  void Clear();
  int width() const { return width_; }

 private:
  FILE* out_;
  bool terminal_ = false;
  int width_ = 100;
  std::string shown_;
};

}  // namespace sluice::cli
