// csrc/cuda/mma.h for emulated kernels.
#pragma once

#include <cuda_runtime.h>

namespace recattn {

// c += a b
template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  emulation::Place place = emulation::Place::current());

}  // namespace recattn
