// CPU kernels of LREA: compression of behaviours, and absorbed attention over states gathered in place.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/host.h"
#include "cpu/isa.h"
#include "lrea_absorbed_attention.h"

namespace recattn {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// One state table [S, H, r, columns] whose last axis is contiguous.
template <class T>
struct StateTable {
    const T* data;
    int64_t slot, head, row;

    const T* at(int64_t slot_index, int64_t head_index) const { return data + slot_index * slot + head_index * head; }
};

template <class T>
struct AbsorbedAttention {
    const T* targets;
    int64_t target_row, target_head;
    StateTable<T> keys, values;
    const int64_t *slots, *offsets;
    T* out;  // [T, H, dv]
    int64_t users, heads, rank, query_dim, value_dim;
    double negative_slope;
};

template <class T>
struct Compress {
    const T* behaviors;
    int64_t behavior_user, behavior_row;
    const accumulate_t<T>* w_comp;  // [Lmax, r]
    const int64_t* starts;          // where each user begins when a user of n behaviours takes n + 1 places
    T* out;                         // [U, r, d]
    int64_t rank, dim;
};

}  // namespace
}  // namespace recattn

#define RECATTN_KERNELS "cpu/lrea_kernels.h"
#include "cpu/foreach_isa.h"

namespace recattn {
namespace {

std::vector<int64_t> checked_slots(const Tensor& tensor, int64_t table_size) {
    const auto slots = to_vector(tensor);
    for (size_t i = 0; i < slots.size(); ++i) {
        expect(slots[i] >= 0 && slots[i] < table_size, "slots must be rows of a table of ", table_size, ", got ",
               slots[i], " at index [", i, "]");
    }
    return slots;
}

std::vector<int64_t> checked_offsets(const Tensor& tensor, int64_t rows) {
    const auto offsets = to_vector(tensor);
    expect(offsets.front() == 0 && offsets.back() == rows, "target_offsets must be offsets from 0 to ", rows,
           ", got offsets from ", offsets.front(), " to ", offsets.back());
    for (size_t i = 1; i < offsets.size(); ++i) {
        expect(offsets[i - 1] <= offsets[i], "target_offsets must be ascending, got ", offsets[i], " at index [", i - 1,
               "]");
    }
    return offsets;
}

// Running sum of (length + 1) over the users, from 0.
std::vector<int64_t> checked_starts(const std::optional<Tensor>& seq_lens, int64_t users, int64_t longest) {
    const auto lengths = seq_lens ? to_vector(*seq_lens) : std::vector<int64_t>(users, longest);
    std::vector<int64_t> starts{0};
    for (size_t i = 0; i < lengths.size(); ++i) {
        expect(lengths[i] >= 0 && lengths[i] <= longest, "seq_lens must be between 0 and ", longest, ", got ",
               lengths[i], " at index [", i, "]");
        starts.push_back(starts.back() + lengths[i] + 1);
    }
    return starts;
}

template <class Function>
void dispatch(ScalarType dtype, const Function& function) {
    switch (dtype) {
        case ScalarType::Double:
            return function(double{});
        case ScalarType::Float:
            return function(float{});
        case ScalarType::BFloat16:
            return function(BFloat16{});
        case ScalarType::Half:
            return function(Half{});
        default:
            expect(false, "targets and behaviors must be float64 or float32 or bfloat16 or float16, got ", dtype);
    }
}

Tensor lrea_absorbed_attention(const Tensor& targets, const Tensor& state_keys, const Tensor& state_values,
                               const Tensor& slots, const Tensor& target_offsets, double negative_slope) {
    const AbsorbedSizes sizes = check_absorbed(targets, state_keys, state_values, slots, target_offsets);
    const auto slot_of_user = checked_slots(slots, sizes.slots);
    const auto offsets = checked_offsets(target_offsets, sizes.rows);
    const Tensor q = with_contiguous_rows(targets), k = with_contiguous_rows(state_keys),
                 v = with_contiguous_rows(state_values);
    const Tensor out = torch::stable::new_empty(targets, {sizes.rows, sizes.heads, sizes.value_dim});
    dispatch(targets.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        const auto table = [](const Tensor& t) {
            return StateTable<T>{t.const_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2)};
        };
        const AbsorbedAttention<T> op{q.const_data_ptr<T>(),
                                      q.stride(0),
                                      q.stride(1),
                                      table(k),
                                      table(v),
                                      slot_of_user.data(),
                                      offsets.data(),
                                      out.mutable_data_ptr<T>(),
                                      sizes.users,
                                      sizes.heads,
                                      sizes.rank,
                                      sizes.query_dim,
                                      sizes.value_dim,
                                      negative_slope};
        const auto kernel = RECATTN_PICK(attend<T>);
        const int64_t cost = sizes.heads * sizes.rank * (sizes.query_dim + sizes.value_dim);
        torch::stable::parallel_for(0, sizes.rows, grain(cost),
                                    [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
    });
    return out;
}

Tensor lrea_compress(const Tensor& behaviors, const Tensor& w_comp, const std::optional<Tensor>& seq_lens) {
    expect_dim("behaviors", behaviors, 3);
    expect_dim("w_comp", w_comp, 2);
    const int64_t users = behaviors.size(0), longest = behaviors.size(1), dim = behaviors.size(2),
                  rank = w_comp.size(1);
    expect(w_comp.size(0) >= longest, "w_comp must have a row for each of ", longest, " behaviors, got ",
           w_comp.size(0));
    expect_dtype("w_comp", w_comp, behaviors.scalar_type());
    if (seq_lens) {
        expect_dim("seq_lens", *seq_lens, 1);
        expect_size("seq_lens", *seq_lens, 0, users);
        expect_integer("seq_lens", *seq_lens);
    }
    const auto starts = checked_starts(seq_lens, users, longest);
    const Tensor e = with_contiguous_rows(behaviors);
    const Tensor out = torch::stable::new_empty(behaviors, {users, rank, dim});
    dispatch(behaviors.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        using A = accumulate_t<T>;
        const auto dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
        const Tensor w = torch::stable::contiguous(torch::stable::to(w_comp, dtype));
        const Compress<T> op{e.const_data_ptr<T>(),     e.stride(0), e.stride(1), w.const_data_ptr<A>(), starts.data(),
                             out.mutable_data_ptr<T>(), rank,        dim};
        const auto kernel = RECATTN_PICK(compress<T>);
        // A thread takes the users that begin in its share, so long and short histories balance.
        torch::stable::parallel_for(0, starts.back(), grain(rank * dim), [&](int64_t begin, int64_t end) {
            const auto user = [&](int64_t start) {
                return std::lower_bound(starts.begin(), starts.end() - 1, start) - starts.begin();
            };
            kernel(op, user(begin), user(end));
        });
    });
    return out;
}

std::string cpu_capability() { return isa_name(isa()); }

STABLE_TORCH_LIBRARY_FRAGMENT(recattn, m) {
    m.def(
        "lrea_absorbed_attention(Tensor targets, Tensor state_keys, Tensor state_values, Tensor slots, "
        "Tensor target_offsets, float negative_slope) -> Tensor");
    m.def("lrea_compress(Tensor behaviors, Tensor w_comp, Tensor? seq_lens) -> Tensor");
    m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CPU, m) {
    m.impl("lrea_absorbed_attention", TORCH_BOX(&lrea_absorbed_attention));
    m.impl("lrea_compress", TORCH_BOX(&lrea_compress));
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CompositeExplicitAutograd, m) {
    m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace
}  // namespace recattn
