# Turns on kernels/cuda when nvcc is found: -DCMAKE_CUDA_COMPILER, PATH, or the folder of `./dev setup --cuda`.
set(SLUICE_CUDA OFF)
