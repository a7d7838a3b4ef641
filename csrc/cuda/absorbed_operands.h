// What the kernels of lrea_absorbed_attention are given, and which candidates a block takes.
//
// The candidates of a user are cut into tiles of 2^shift rows, and a block takes one tile of one head. Tiles are
// counted so that one is found without a table of them: user u has those from (offsets[u] >> shift) + u up to user
// u+1's first, as many as its rows need or one more, which is empty.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace recattn {

constexpr int kLanes = 32;

struct Indices {
    const void* data;  // null where there are none
    bool is_int64;

    __device__ int64_t operator[](int64_t i) const {
        return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    }
};

// [S, H, r, d] in the targets' dtype, or int8 with a scale for each row.
struct StateTable {
    const void* data;
    int64_t slot, head, row, column;  // strides
    const float* scales;              // null unless int8
    int64_t scale_slot, scale_head, scale_row;
};

template <class T>
struct Operands {
    const T* targets;
    int64_t target_row, target_head, target_column;
    Indices item_ids;
    StateTable keys, values;
    Indices slots, offsets;
    T* out;  // [T, H, dv]
    int64_t rows, items, users, heads, table_size;
    int rank, query_dim, value_dim, shift;
    float negative_slope;
};

// Rows first .. first+rows of the output, all of one user.
struct Tile {
    int64_t first, slot;
    int rows;
};

// Every block looks at other users, so that together they look at all: bad offsets stop the kernel.
template <class T>
__device__ void expect_offsets(const Operands<T>& op) {
    const int64_t user = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (user >= op.users || blockIdx.y > 0 || blockIdx.z > 0) return;
    const int64_t begin = op.offsets[user], end = op.offsets[user + 1];
    if (begin > end || (user == 0 && begin != 0) || (user == op.users - 1 && end != op.rows)) __trap();
}

// The last user whose tiles begin at or before `tile`, by 32 probes at a time.
template <class T>
__device__ int64_t find_user(const Operands<T>& op, int64_t tile) {
    int64_t low = 0, high = op.users;
    while (high - low > 1) {
        const int64_t step = (high - low + kLanes - 1) / kLanes;
        const int lane = threadIdx.x % kLanes;
        const int64_t probe = low + lane * step;
        const bool before = lane == 0 || (probe < high && (op.offsets[probe] >> op.shift) + probe <= tile);
        low += (__popc(__ballot_sync(0xffffffff, before)) - 1) * step;
        high = min(high, low + step);
    }
    return low;
}

template <class T>
__device__ Tile find_tile(const Operands<T>& op) {
    const int64_t user = find_user(op, blockIdx.x);
    const int64_t begin = op.offsets[user], end = op.offsets[user + 1], slot = op.slots[user];
    // A batch that does not fit its tables stops here, as an index out of range does in PyTorch.
    if (begin < 0 || begin > end || end > op.rows) __trap();
    const int64_t first = begin + ((blockIdx.x - user - (begin >> op.shift)) << op.shift);
    if (first < begin || first >= end) return {first, 0, 0};
    if (slot < 0 || slot >= op.table_size) __trap();
    return {first, slot, static_cast<int>(min(end - first, static_cast<int64_t>(1) << op.shift))};
}

// Where the target of an output row lies.
template <class T>
__device__ const T* target_of(const Operands<T>& op, int64_t row, int head) {
    if (op.item_ids.data != nullptr) {
        row = op.item_ids[row];
        if (row < 0 || row >= op.items) __trap();
    }
    return op.targets + row * op.target_row + head * op.target_head;
}

__device__ inline float leaky_relu(float x, float negative_slope) { return x > 0.f ? x : x * negative_slope; }

}  // namespace recattn
