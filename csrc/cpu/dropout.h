// Dropout of attention weights: the mask of triton_kernels/common/dropout.py.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <optional>

#include "cpu/common.h"

namespace recattn {

// A weight is dropped if its 16 random bits are below `threshold`, and multiplied by `scale` otherwise.
struct Dropout {
    uint64_t seed = 0;
    int32_t threshold = 0;  // 0: no dropout
    float scale = 1;

    Dropout() = default;
    Dropout(const std::optional<Tensor>& seed_tensor, double probability) {
        if (!seed_tensor || probability == 0) return;
        seed = static_cast<uint64_t>(*seed_tensor->const_data_ptr<int64_t>());
        threshold = std::min<int32_t>(std::lround(probability * 65536), 65535);
        scale = 65536.0f / (65536 - threshold);
    }

    explicit operator bool() const { return threshold > 0; }
};

// Philox streams: one seed gives the weights of each stream numbers of their own.
inline constexpr uint32_t kPerToken = 0, kPerSink = 1, kInterSinkBias = 2;

}  // namespace recattn
