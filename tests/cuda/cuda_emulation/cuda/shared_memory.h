// csrc/cuda/shared_memory.h for emulated kernels, each of which has one such variable of either kind.
#pragma once

#include <cuda_runtime.h>

#define RECATTN_SHARED_MEMORY(T, name) T& name = *static_cast<T*>(emulation::shared_memory(sizeof(T)))
#define RECATTN_DYNAMIC_SHARED_MEMORY(T, name) T* name = static_cast<T*>(emulation::dynamic_shared_memory())
