// Runs kernel tests once for each SIMD target that was compiled and that this processor has.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "hwy/highway.h"

namespace sluice {

inline std::vector<int64_t> SimdTargets() { return hwy::SupportedAndGeneratedTargets(); }

inline std::string SimdTargetLabel(const testing::TestParamInfo<int64_t>& info) {
  return hwy::TargetName(info.param);
}

// Base of tests that take a target as their parameter: all kernels use it while the test runs.
class SimdTargetTest : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override {
    hwy::SetSupportedTargetsForTest(GetParam());
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
  void TearDown() override {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

}  // namespace sluice
