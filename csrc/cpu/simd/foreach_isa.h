// Compiles the header RECATTN_KERNELS once for each instruction set, each time in its own namespace, so that one
// portable binary chooses its code at run time (isa.h). No include guard. What the header defines is in an unnamed
// namespace: the linker would merge functions of one name in two operators. The compiled header sees these macros:
//   RECATTN_ISA            its namespace
//   RECATTN_TARGET         attribute of every function and lambda (vectors are lowered before inlining)
//   RECATTN_INLINE         the same, and always inlined
//   RECATTN_VECTOR_BYTES   width of a register
//   RECATTN_TILE_ROWS, RECATTN_TILE_VECTORS   register tile of a matrix product
//   RECATTN_HAS_AVX512     the registers have 64 bytes and AVX-512's instructions
//   RECATTN_HAS_BF16       AVX512-BF16 and VNNI; only compiled if RECATTN_WITH_BF16 is defined

#define RECATTN_INLINE RECATTN_TARGET __attribute__((always_inline)) inline

#if defined(__x86_64__)

#define RECATTN_HAS_AVX512 1
#define RECATTN_VECTOR_BYTES 64
#define RECATTN_TILE_ROWS 6
#define RECATTN_TILE_VECTORS 4
#if defined(RECATTN_WITH_BF16)
#define RECATTN_ISA avx512_bf16
#define RECATTN_HAS_BF16 1
#define RECATTN_TARGET __attribute__((target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#include RECATTN_KERNELS
#undef RECATTN_ISA
#undef RECATTN_HAS_BF16
#undef RECATTN_TARGET
#endif
#define RECATTN_ISA avx512
#define RECATTN_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#include RECATTN_KERNELS
#undef RECATTN_ISA
#undef RECATTN_TARGET
#undef RECATTN_HAS_AVX512
#undef RECATTN_VECTOR_BYTES
#undef RECATTN_TILE_ROWS
#undef RECATTN_TILE_VECTORS

#define RECATTN_ISA avx2
#define RECATTN_TARGET __attribute__((target("avx2,fma,f16c")))
#define RECATTN_VECTOR_BYTES 32
#define RECATTN_TILE_ROWS 6
#define RECATTN_TILE_VECTORS 2
#include RECATTN_KERNELS
#undef RECATTN_ISA
#undef RECATTN_TARGET
#undef RECATTN_VECTOR_BYTES
#undef RECATTN_TILE_ROWS
#undef RECATTN_TILE_VECTORS

#endif

// What every processor of the architecture has: SSE2, or NEON (32 registers).
#define RECATTN_ISA baseline
#define RECATTN_TARGET
#define RECATTN_VECTOR_BYTES 16
#define RECATTN_TILE_ROWS 6
#if defined(__x86_64__)
#define RECATTN_TILE_VECTORS 2
#else
#define RECATTN_TILE_VECTORS 4
#endif
#include RECATTN_KERNELS
#undef RECATTN_ISA
#undef RECATTN_TARGET
#undef RECATTN_VECTOR_BYTES
#undef RECATTN_TILE_ROWS
#undef RECATTN_TILE_VECTORS

#undef RECATTN_INLINE
#undef RECATTN_KERNELS
#undef RECATTN_WITH_BF16
