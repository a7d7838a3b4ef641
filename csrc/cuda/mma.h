// One tensor-core product of a warp: C [16, 8] += A [16, 16] B [16, 8], half-precision operands, float sums.
//
// With g = lane / 4 and t = lane % 4, a lane holds
//   A [16, 16]  a[0] = A[g, 2t..2t+1]      a[1] = A[g+8, 2t..]    a[2] = A[g, 2t+8..]    a[3] = A[g+8, 2t+8..]
//   B [16, 8]   b[0] = B[2t..2t+1, g]      b[1] = B[2t+8..2t+9, g]
//   C [16, 8]   c[0..1] = C[g, 2t..2t+1]   c[2..3] = C[g+8, 2t..2t+1]
// with two numbers in a word, the first in its low half. Two tiles of C side by side have the layout of one tile of A.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace recattn {

// c += a b
template <class T>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define RECATTN_DEFINE_MULTIPLY_ADD(T, ptx_type)                                                              \
    template <>                                                                                               \
    __device__ inline void multiply_add<T>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." ptx_type "." ptx_type                           \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                   \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                         \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                         \
    }
RECATTN_DEFINE_MULTIPLY_ADD(__half, "f16")
RECATTN_DEFINE_MULTIPLY_ADD(__nv_bfloat16, "bf16")
#undef RECATTN_DEFINE_MULTIPLY_ADD

}  // namespace recattn
