// In place of csrc/cpu/simd/foreach_isa.h under sanitizers, which compile slowly: AVX2's kernels under every name. But
// what needs AVX512-BF16's is compiled as ever. No include guard, as there.
#if defined(RECATTN_WITH_BF16) || !defined(__x86_64__)

#include_next "cpu/simd/foreach_isa.h"

#else

#define RECATTN_ISA avx2
#define RECATTN_TARGET __attribute__((target("avx2,fma,f16c")))
#define RECATTN_INLINE RECATTN_TARGET __attribute__((always_inline)) inline
#define RECATTN_VECTOR_BYTES 32
#define RECATTN_TILE_ROWS 6
#define RECATTN_TILE_VECTORS 2
#include RECATTN_KERNELS
#undef RECATTN_ISA
#undef RECATTN_TARGET
#undef RECATTN_INLINE
#undef RECATTN_VECTOR_BYTES
#undef RECATTN_TILE_ROWS
#undef RECATTN_TILE_VECTORS
#undef RECATTN_KERNELS

namespace recattn {
namespace baseline = avx2;
namespace avx512 = avx2;
}  // namespace recattn

#endif
