// Explicit conversions: torch compiles extensions without the implicit conversions of CUDA's half types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace recattn {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(int8_t value) { return static_cast<float>(value); }

__device__ inline void store(float value, float* out) { *out = value; }
__device__ inline void store(float value, __half* out) { *out = __float2half(value); }
__device__ inline void store(float value, __nv_bfloat16* out) { *out = __float2bfloat16(value); }

// Rounds both numbers to T and packs them in one word, `low` in its low half.
template <class T>
__device__ uint32_t pack(float low, float high) {
    T pair[2];
    store(low, pair);
    store(high, pair + 1);
    uint32_t word;
    memcpy(&word, pair, sizeof word);
    return word;
}

}  // namespace recattn
