// The kernels of csrc/cuda on problems of odd sizes and wild indices, without PyTorch: for the sanitizers, each of
// whose tensors ends where its memory does, and to see that the emulation notices a kernel that is wrong.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/absorbed_launch.h"

namespace {

using recattn::Operands;

std::mt19937 random_bits(0);

int64_t draw_index(int64_t bound) { return std::uniform_int_distribution<int64_t>(0, bound - 1)(random_bits); }
float draw_normal() { return std::normal_distribution<float>()(random_bits); }

[[noreturn]] void fail(const std::string& why) {
    std::printf("wrong: %s\n", why.c_str());
    std::exit(1);
}

template <class T>
float epsilon() {
    return std::is_same_v<T, float> ? 0x1p-23f : 0x1p-7f;
}

// A tensor whose last axis may have gaps, in memory that ends with it.
template <class T>
struct Numbers {
    int64_t gap;
    std::unique_ptr<T[]> data;

    template <class Draw>
    Numbers(int64_t size, int64_t gap, const Draw& draw) : gap(gap), data(new T[size == 0 ? 0 : (size - 1) * gap + 1]) {
        for (int64_t i = 0; i < size; ++i) data[i * gap] = T(draw());
    }
    float operator[](int64_t i) const { return recattn::to_float(data[i * gap]); }
};

struct Sizes {
    int rank, query_dim, value_dim;
    int heads = 2, table = 5, items = 11;
    int64_t gap = 1;
};

enum class Indices { kRight, kWild, kWildUncounted };

constexpr int64_t kHuge = int64_t{1} << 40;

template <class T, class State>
void serve(const Sizes& sizes, const std::vector<int>& counts, Indices kind) {
    const auto [rank, query_dim, value_dim, heads, table, items, gap] = sizes;
    const bool is_right = kind == Indices::kRight, is_int8 = std::is_same_v<State, int8_t>;
    const int64_t users = static_cast<int64_t>(counts.size());
    std::vector<int64_t> offsets{0}, slots;
    for (int count : counts) offsets.push_back(offsets.back() + count), slots.push_back(draw_index(table));
    const int64_t rows = offsets.back();
    std::vector<int64_t> ids;
    for (int64_t t = 0; t < rows; ++t) ids.push_back(draw_index(items));
    if (!is_right) {
        const std::vector<int64_t> wild{-kHuge, -1, 0, 3, table, items, rows / 2, rows, rows + 1, kHuge};
        for (auto* indices : {&offsets, &slots, &ids}) {
            for (int64_t& index : *indices) {
                if (draw_index(3) == 0) index = wild[draw_index(wild.size())];
            }
        }
        slots[0] = table;
    }

    const Numbers<T> targets(int64_t{items} * heads * query_dim, gap, draw_normal);
    const auto draw_state = [] { return is_int8 ? static_cast<float>(draw_index(255) - 127) : draw_normal(); };
    const int64_t state_rows = int64_t{table} * heads * rank;
    const Numbers<State> keys(state_rows * query_dim, gap, draw_state), values(state_rows * value_dim, gap, draw_state);
    const auto draw_scale = [] { return is_int8 ? 0.01f * std::abs(draw_normal()) : 1.f; };
    const Numbers<float> key_scales(state_rows, 1, draw_scale), value_scales(state_rows, 1, draw_scale);
    const Numbers<T> out(rows * heads * value_dim, 1, [] { return std::numeric_limits<float>::quiet_NaN(); });
    unsigned long long invalid = 0;

    const auto state_table = [&](const Numbers<State>& state, int width, const Numbers<float>& scales) {
        const int64_t row = width * gap, head = rank * row;
        recattn::StateTable result{state.data.get(), heads * head, head, row, gap};
        if (is_int8) {
            result.scales = scales.data.get();
            result.scale_slot = heads * rank, result.scale_head = rank, result.scale_row = 1;
        }
        return result;
    };
    const Operands<T> op{.targets = targets.data.get(),
                         .target_row = heads * query_dim * gap,
                         .target_head = query_dim * gap,
                         .target_column = gap,
                         .item_ids = {ids.data(), true},
                         .keys = state_table(keys, query_dim, key_scales),
                         .values = state_table(values, value_dim, value_scales),
                         .slots = {slots.data(), true},
                         .offsets = {offsets.data(), true},
                         .out = out.data.get(),
                         .invalid = kind == Indices::kWild ? &invalid : nullptr,
                         .rows = rows,
                         .items = items,
                         .users = users,
                         .heads = heads,
                         .table_size = table,
                         .rank = rank,
                         .query_dim = query_dim,
                         .value_dim = value_dim,
                         .negative_slope = 0.1f};
    const auto in_pieces = [&](int piece) { return gap == 1 && query_dim % piece == 0 && value_dim % piece == 0; };
    const auto access = in_pieces(8) && query_dim > 0 && rank <= recattn::mma::kMaxRank ? recattn::Access::kTensorCores
                        : in_pieces(4)                                                  ? recattn::Access::kQuads
                                                                                        : recattn::Access::kNumbers;
    try {
        recattn::launch_absorbed_attention(op, access, nullptr);
        if (kind == Indices::kWildUncounted) fail("an index out of range did not stop the kernel");
    } catch (const std::runtime_error& error) {
        if (kind != Indices::kWildUncounted || std::string(error.what()).find("trap") == std::string::npos) throw;
        return;
    }
    if ((invalid > 0) == is_right) fail(std::to_string(invalid) + " indices out of range");
    for (int64_t i = 0; i < rows * heads * value_dim; ++i) {
        if (!std::isfinite(out[i])) fail("an output is " + std::to_string(out[i]));
    }
    for (int64_t t = 0, user = 0; is_right && t < rows; ++t) {
        while (t >= offsets[user + 1]) ++user;
        for (int head = 0; head < heads; ++head) {
            std::vector<double> expected(value_dim), magnitude(value_dim);
            for (int k = 0; k < rank; ++k) {
                const int64_t row = (slots[user] * heads + head) * rank + k;
                double score = 0, most = 0;
                for (int i = 0; i < query_dim; ++i) {
                    const double target = targets[(ids[t] * heads + head) * query_dim + i];
                    const double term = target * keys[row * query_dim + i] * key_scales[row];
                    score += term, most += std::abs(term);
                }
                for (int n = 0; n < value_dim; ++n) {
                    const double value = values[row * value_dim + n] * value_scales[row];
                    expected[n] += (score > 0 ? score : score * op.negative_slope) * value;
                    magnitude[n] += most * std::abs(value);
                }
            }
            for (int n = 0; n < value_dim; ++n) {
                const float got = out[(t * heads + head) * value_dim + n];
                if (std::abs(got - expected[n]) <= 4 * epsilon<T>() * magnitude[n]) continue;
                fail(std::to_string(got) + " in place of " + std::to_string(expected[n]));
            }
        }
    }
}

template <class T>
void serve_all() {
    const std::vector<int> counts{1, 0, 17, 130, 0, 33};
    for (const Sizes& sizes : {Sizes{.rank = 7, .query_dim = 65, .value_dim = 3},
                               Sizes{.rank = 33, .query_dim = 8, .value_dim = 129, .gap = 3},
                               Sizes{.rank = 40, .query_dim = 0, .value_dim = 5},
                               Sizes{.rank = 37, .query_dim = 36, .value_dim = 68, .heads = 3},
                               Sizes{.rank = 16, .query_dim = 8, .value_dim = 40}, Sizes{32, 64, 72},
                               Sizes{.rank = 35, .query_dim = 104, .value_dim = 32, .heads = 1}}) {
        for (Indices kind : {Indices::kRight, Indices::kWild, Indices::kWild, Indices::kWildUncounted}) {
            serve<T, T>(sizes, counts, kind);
            serve<T, int8_t>(sizes, counts, kind);
        }
    }
}

}  // namespace

int main() {
    try {
        serve_all<float>();
        serve_all<__nv_bfloat16>();  // from which float16 differs by conversions alone
    } catch (const std::exception& error) {
        fail(error.what());
    }
    std::puts("right");
}
