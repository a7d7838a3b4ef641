// Declares a block's shared memory: of a size known here, and of as many T as the launch asks for. These are macros so
// that tests/cuda/cuda_emulation, which has its own shared_memory.h and mma.h, runs all else in this folder on a CPU.
#pragma once

#include <cuda_runtime.h>

#define RECATTN_SHARED_MEMORY(T, name) __shared__ T name
#define RECATTN_DYNAMIC_SHARED_MEMORY(T, name) extern __shared__ T name[]
