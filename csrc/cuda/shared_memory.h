// Declares a block's shared memory, of fixed size or of the size given at launch. Macros, because
// tests/cuda/cuda_emulation replaces this file and mma.h to run the kernels on a CPU.
#pragma once

#include <cuda_runtime.h>

#define RECATTN_SHARED_MEMORY(T, name) __shared__ T name
#define RECATTN_DYNAMIC_SHARED_MEMORY(T, name) extern __shared__ T name[]
