// CublasLibrary: the functions of cuBLASLt that Gemm calls, found when the first Gemm is made.
//
// Why not linked: the library is half a GiB and costs each process that starts with it 0.3 s and
// 200 MiB of relocated pages, also those that never see a GPU. So programs start without it, and a
// machine without it learns so from a status.
#pragma once

#include <cublasLt.h>

#include "absl/status/status.h"

namespace sluice {

struct CublasLibrary {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtDestroy) destroy;
  decltype(&cublasLtGetStatusString) status_string;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmul) matmul;
  decltype(&cublasLtMatmulDescInit_internal) desc_init;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set;
  decltype(&cublasLtMatrixLayoutInit_internal) layout_init;
  decltype(&cublasLtMatmulPreferenceInit_internal) preference_init;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;

  // Finds the library: by the loader's own rules, then where it was at build time. NOT_FOUND says
  // where it was looked for. Safe from many threads; it stays loaded.
  static absl::Status Load();

  // REQUIRES: Load() was OK.
  static const CublasLibrary* Get();
};

}  // namespace sluice
