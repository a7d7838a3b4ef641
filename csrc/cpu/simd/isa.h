// Chooses at run time the instruction set that the kernels of foreach_isa.h use.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>

#include "common/check.h"

namespace recattn {

// Ascending: each includes those before it. avx512_bf16 includes VNNI.
enum class Isa { baseline, avx2, avx512, avx512_bf16 };

inline const char* isa_name(Isa isa) {
    constexpr const char* names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
    return names[static_cast<int>(isa)];
}

inline Isa best_isa() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? Isa::avx512_bf16
                                                                                            : Isa::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::baseline;
}

// The best that the processor has, or less if RECATTN_CPU_CAPABILITY=baseline|avx2|avx512|avx512_bf16 asks for less.
inline Isa isa() {
    static const Isa chosen = [] {
        const char* asked = std::getenv("RECATTN_CPU_CAPABILITY");
        if (asked == nullptr) return best_isa();
        for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
            if (asked == std::string(isa_name(isa))) return std::min(isa, best_isa());
        }
        expect(false, "RECATTN_CPU_CAPABILITY must be baseline or avx2 or avx512 or avx512_bf16, got ", asked);
        return Isa::baseline;
    }();
    return chosen;
}

// Whether bfloat16 products beat products widened to float32. Not on Intel, where VDPBF16PS does twice the work of an
// FMA in four times its time. Setting RECATTN_CPU_CAPABILITY to avx512_bf16 uses them anyway.
inline bool bf16_products_are_faster() {
#if defined(__x86_64__)
    static const bool faster = !__builtin_cpu_is("intel") || std::getenv("RECATTN_CPU_CAPABILITY") != nullptr;
    return isa() == Isa::avx512_bf16 && faster;
#else
    return false;
#endif
}

}  // namespace recattn

#if defined(__x86_64__)
#define RECATTN_PICK(...)                                         \
    (recattn::isa() >= recattn::Isa::avx512 ? avx512::__VA_ARGS__ \
     : recattn::isa() == recattn::Isa::avx2 ? avx2::__VA_ARGS__   \
                                            : baseline::__VA_ARGS__)
#else
#define RECATTN_PICK(...) (baseline::__VA_ARGS__)
#endif
