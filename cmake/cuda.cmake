# Turns on kernels/cuda when a CUDA compiler is found, and leaves it out otherwise: a build without it is a full product on CPU.
# nvcc is looked for in -DCMAKE_CUDA_COMPILER, CUDACXX, PATH, CUDA_PATH, and the folder of `./dev setup --cuda`.
# SLUICE_WITH_CUDA=OFF leaves it out in any case, ON fails when there is none. No GPU is needed to build.
set(SLUICE_WITH_CUDA AUTO CACHE STRING "kernels/cuda: AUTO (when nvcc is found), ON or OFF")
set_property(CACHE SLUICE_WITH_CUDA PROPERTY STRINGS AUTO ON OFF)
set(SLUICE_CUDA OFF)

# Sets CMAKE_CUDA_COMPILER when it is not set and nvcc is found.
function(find_nvcc)
  if(CMAKE_CUDA_COMPILER OR DEFINED ENV{CUDACXX})
    return()
  endif()
  if(DEFINED ENV{SLUICE_CACHE})
    set(cache $ENV{SLUICE_CACHE})
  elseif(DEFINED ENV{XDG_CACHE_HOME})
    set(cache $ENV{XDG_CACHE_HOME}/sluice)
  else()
    set(cache $ENV{HOME}/.cache/sluice)
  endif()
  find_program(SLUICE_NVCC nvcc HINTS $ENV{CUDA_PATH}/bin ${cache}/cuda-13.0.2/toolkit/bin /usr/local/cuda/bin)
  if(SLUICE_NVCC)
    set(CMAKE_CUDA_COMPILER ${SLUICE_NVCC} CACHE FILEPATH "CUDA compiler")
  endif()
endfunction()

if(SLUICE_WITH_CUDA)  # AUTO is true
  find_nvcc()
  if(CMAKE_CUDA_COMPILER OR DEFINED ENV{CUDACXX})
    set(SLUICE_CUDA ON)
  elseif(NOT SLUICE_WITH_CUDA STREQUAL AUTO)
    message(FATAL_ERROR "SLUICE_WITH_CUDA=ON, but there is no nvcc: run ./dev setup --cuda, or set CMAKE_CUDA_COMPILER")
  endif()
endif()

if(SLUICE_CUDA)
  # sm_80 and sm_90a as machine code, and PTX for later cards.
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 80-virtual)
  endif()
  # CMake 3.25 asks for a library that CUDA 13 no longer has, and does not know nvcc's -std=c++20.
  if(NOT TARGET CUDA::nvToolsExt)
    add_library(CUDA::nvToolsExt INTERFACE IMPORTED)
  endif()
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  find_package(CUDAToolkit 12.8 REQUIRED)
  message(STATUS "CUDA: ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
else()
  message(STATUS "CUDA: none (./dev setup --cuda installs the compiler)")
endif()
