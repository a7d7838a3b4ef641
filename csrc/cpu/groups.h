// Groups of (batch, head) indices, the tasks of operators that compute one (batch, head) after another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/common.h"
#include "cpu/sequences.h"

namespace recattn {

// Splits all (batch, head) indices into groups of about equal cost. The groups do not depend on the number of threads.
class Groups {
  public:
    Groups(const std::vector<Span>& spans, int64_t heads, int64_t columns) {
        const int64_t batch_heads = static_cast<int64_t>(spans.size()) * heads;
        std::vector<int64_t> costs{0};  // running sum of multiply-adds
        for (const Span& span : spans) {
            const int64_t cost = span.length * span.length * columns + 1;
            for (int64_t head = 0; head < heads; ++head) costs.push_back(costs.back() + cost);
        }
        const int64_t wanted = std::clamp<int64_t>(batch_heads / kBatchHeadsPerGroup, kMinGroups, kMaxGroups);
        const int64_t count = std::clamp<int64_t>(batch_heads, 1, wanted);
        for (int64_t group = 0; group <= count; ++group) {
            const double cost = static_cast<double>(costs.back()) * group / count;
            starts_.push_back(std::lower_bound(costs.begin(), costs.end() - 1, cost) - costs.begin());
        }
        cost_ = costs.back() / count;
    }

    int64_t count() const { return static_cast<int64_t>(starts_.size()) - 1; }
    int64_t start(int64_t group) const { return starts_[group]; }

    template <class Function>
    void parallel_for(const Function& function) const {
        torch::stable::parallel_for(0, count(), grain(cost_), function);
    }

  private:
    // Each group has its own sum of dW; few groups keep that memory below that of the tokens.
    static constexpr int64_t kBatchHeadsPerGroup = 8, kMinGroups = 16, kMaxGroups = 64;
    std::vector<int64_t> starts_;
    int64_t cost_;
};

}  // namespace recattn
