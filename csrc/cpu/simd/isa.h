// Which instruction set the kernels of foreach_isa.h run with on this processor.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>

#include "common/check.h"

namespace recattn {

// Each has what those before it have; avx512_bf16 has VNNI too.
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

// RECATTN_CPU_CAPABILITY=baseline|avx2|avx512|avx512_bf16 asks for less than the processor has, never for more.
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

// Intel's processors take four times as long for a VDPBF16PS as for an FMA, which does half its work (their tiles are
// for that): widened to float32, bfloat16 is faster there. Asked for by name, it is done nonetheless.
inline bool bf16_products_pay() {
#if defined(__x86_64__)
    static const bool pay = !__builtin_cpu_is("intel") || std::getenv("RECATTN_CPU_CAPABILITY") != nullptr;
    return isa() == Isa::avx512_bf16 && pay;
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
