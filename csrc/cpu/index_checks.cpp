// Checks of index values on a CPU. Each reads the tensor once and returns the copy that it checked, so that another
// thread of the caller cannot change it afterwards. Messages are worded as in python/recattn/_check.py.
#include "cpu/index_checks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "cpu/common.h"

namespace recattn {
namespace {

// A contiguous copy, each entry of which was read once.
template <class I>
struct Copy {
    Tensor tensor;
    I* data;
    int64_t size;

    explicit Copy(const Tensor& indices) : tensor(new_empty(indices.sizes(), indices.scalar_type())) {
        data = tensor.mutable_data_ptr<I>();
        size = tensor.numel();
        const Tensor source = indices.is_contiguous() ? indices : torch::stable::contiguous(indices);
        const I* entries = source.const_data_ptr<I>();
        for (int64_t i = 0; i < size; ++i) data[i] = read_once(entries[i]);
    }
};

// Calls function(copy) with the copy's entries as int32 or int64, and returns the copy.
template <class Function>
Tensor check_copy(const std::string& name, const Tensor& indices, const Function& function) {
    expect_integer(name.c_str(), indices);
    const auto check = [&](auto copy) {
        function(copy);
        return copy.tensor;
    };
    if (indices.scalar_type() == ScalarType::Int) return check(Copy<int32_t>(indices));
    return check(Copy<int64_t>(indices));
}

// The index of an entry in the tensor, such as [1, 3], as Python prints it.
std::string format_index(const Tensor& tensor, int64_t entry) {
    std::vector<std::string> index(tensor.dim());
    for (int64_t axis = tensor.dim() - 1; axis >= 0; --axis) {
        index[axis] = std::to_string(entry % tensor.size(axis));
        entry /= tensor.size(axis);
    }
    return format_list(index);
}

// Raises an error for the first entry for which holds(i, entry) is false.
template <class I, class Holds, class... Words>
void expect_all(const std::string& name, const Copy<I>& copy, const Holds& holds, const Words&... expected) {
    for (int64_t i = 0; i < copy.size; ++i) {
        if (holds(i, int64_t{copy.data[i]})) continue;
        expect(false, name, " must be ", expected..., ", got ", copy.data[i], " at index ",
               format_index(copy.tensor, i));
    }
}

Tensor checked_lengths(const std::string& name, const Tensor& lengths, int64_t longest) {
    return check_copy(name, lengths, [&](const auto& copy) {
        expect_all(
            name, copy, [&](int64_t, int64_t length) { return length >= 0 && length <= longest; }, "between 0 and ",
            longest);
    });
}

Tensor checked_offsets(const std::string& name, const Tensor& offsets, int64_t total) {
    return check_copy(name, offsets, [&](const auto& copy) {
        expect(copy.size > 0, name, " must have an offset");
        const int64_t first = copy.data[0], last = copy.data[copy.size - 1];
        expect(first == 0 && last == total, name, " must be offsets from 0 to ", total, ", got offsets from ", first,
               " to ", last);
        const auto ascends = [&](int64_t i, int64_t offset) { return i == 0 || offset >= copy.data[i - 1]; };
        expect_all(name, copy, ascends, "ascending");
    });
}

// With seq_lens, which are checked, only the first seq_lens[u] entries of rows[u] count.
Tensor checked_rows(const std::string& name, const Tensor& rows, int64_t table_size,
                    const std::optional<Tensor>& seq_lens) {
    const bool padded = seq_lens && rows.dim() == 2;
    std::vector<int64_t> lengths;
    if (padded) {
        expect_shape("seq_lens", *seq_lens, {{"U", rows.size(0)}});
        expect_integer("seq_lens", *seq_lens);
        lengths = to_vector(*seq_lens);
    }
    const int64_t longest = padded ? rows.size(1) : 1;
    return check_copy(name, rows, [&](const auto& copy) {
        const auto fits = [&](int64_t i, int64_t row) {
            return is_row(row, table_size) || (padded && i % longest >= lengths[i / longest]);
        };
        expect_all(name, copy, fits, "rows of a table of ", table_size);
    });
}

// Positions ascend below seq_len (with cu_seqlens below their sequence's length), then -1.
Tensor checked_sink_positions(const Tensor& sink_positions, std::optional<int64_t> seq_len,
                              const std::optional<Tensor>& cu_seqlens) {
    const std::string name = "sink_positions";
    expect_shape(name.c_str(), sink_positions, {{"B"}, {"M"}});
    expect(seq_len.has_value() != cu_seqlens.has_value(), "sink_positions need either seq_len or cu_seqlens");
    const int64_t batch = sink_positions.size(0), count = sink_positions.size(1);
    std::vector<int64_t> offsets;
    if (cu_seqlens) {
        expect_shape("cu_seqlens", *cu_seqlens, {{"B+1", batch + 1}});
        expect_integer("cu_seqlens", *cu_seqlens);
        offsets = to_vector(*cu_seqlens);
        expect_offsets("cu_seqlens", offsets, offsets.back());  // whatever the number of tokens, no length overflows
    }
    const auto limit = [&](int64_t b) { return seq_len ? *seq_len : offsets[b + 1] - offsets[b]; };
    return check_copy(name, sink_positions,
                      [&](const auto& copy) { expect_sink_positions(copy.data, batch, count, seq_len, limit); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(recattn, m) {
    m.def("checked_lengths_cpu(str name, Tensor lengths, int longest) -> Tensor");
    m.def("checked_offsets_cpu(str name, Tensor offsets, int total) -> Tensor");
    m.def("checked_rows_cpu(str name, Tensor rows, int table_size, Tensor? seq_lens) -> Tensor");
    m.def("checked_sink_positions_cpu(Tensor sink_positions, int? seq_len, Tensor? cu_seqlens) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CPU, m) {
    m.impl("checked_lengths_cpu", TORCH_BOX(&checked_lengths));
    m.impl("checked_offsets_cpu", TORCH_BOX(&checked_offsets));
    m.impl("checked_rows_cpu", TORCH_BOX(&checked_rows));
    m.impl("checked_sink_positions_cpu", TORCH_BOX(&checked_sink_positions));
}

}  // namespace
}  // namespace recattn
