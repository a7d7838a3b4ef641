// What the kernels of lrea_absorbed_attention are given, and which candidates a block takes.
//
// The candidates of a user are cut into tiles of 2^shift rows, and a block takes one tile of one head. Tiles are
// counted so that one is found without a table of them: user u has those from (offsets[u] >> shift) + u up to user
// u+1's first, as many as its rows need or one more, which is empty.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "convert.h"

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
    T* out;                       // [T, H, dv]
    unsigned long long* invalid;  // counts indices out of range; null: such an index stops the kernel
    int64_t rows, items, users, heads, table_size;
    int rank, query_dim, value_dim, shift;
    float negative_slope;
};

// Rows first .. first+rows of the output, all of one user, whose slot is -1 if it is no row of the tables.
struct Tile {
    int64_t first, slot;
    int rows;
};

__device__ inline bool is_row(int64_t index, int64_t table_size) {
    return static_cast<uint64_t>(index) < static_cast<uint64_t>(table_size);
}

// Of an index out of range: counts it, or stops the kernel as it does in PyTorch.
template <class T>
__device__ void report(const Operands<T>& op) {
    if (op.invalid == nullptr) __trap();
    atomicAdd(op.invalid, 1ull);
}

// Every block looks at other users, so that together they look at all.
template <class T>
__device__ void check_users(const Operands<T>& op) {
    const int64_t user = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (user >= op.users || blockIdx.y > 0 || blockIdx.z > 0) return;
    const int64_t begin = op.offsets[user], end = op.offsets[user + 1];
    if (begin > end || (user == 0 && begin != 0) || (user == op.users - 1 && end != op.rows)) report(op);
    if (!is_row(op.slots[user], op.table_size)) report(op);
}

// An offset, kept inside the output.
template <class T>
__device__ int64_t offset_of(const Operands<T>& op, int64_t user) {
    return max(int64_t{0}, min(op.offsets[user], op.rows));
}

// The last user whose tiles begin at or before `tile`, by 32 probes at a time. Where offsets descend there may be more
// than one: the one found never decreases from tile to tile, so that no row is left out between two tiles.
template <class T>
__device__ int64_t find_user(const Operands<T>& op, int64_t tile) {
    int64_t low = 0, high = op.users;
    while (high - low > 1) {
        const int64_t step = (high - low + kLanes - 1) / kLanes;
        const int lane = threadIdx.x % kLanes;
        const int64_t probe = low + lane * step;
        const bool before = lane == 0 || (probe < high && (offset_of(op, probe) >> op.shift) + probe <= tile);
        low += (kLanes - 1 - __clz(__ballot_sync(0xffffffff, before))) * step;
        high = min(high, low + step);
    }
    return low;
}

template <class T>
__device__ Tile find_tile(const Operands<T>& op) {
    const int64_t user = find_user(op, blockIdx.x);
    const int64_t begin = offset_of(op, user), end = offset_of(op, user + 1), slot = op.slots[user];
    const int64_t first = begin + ((blockIdx.x - user - (begin >> op.shift)) << op.shift);
    if (first < begin || first >= end) return {first, 0, 0};
    return {first, is_row(slot, op.table_size) ? slot : -1,
            static_cast<int>(min(end - first, static_cast<int64_t>(1) << op.shift))};
}

// Where the target of one of a tile's rows lies, of its last row beyond them; null for an item id that is no row.
template <class T>
__device__ const T* target_of(const Operands<T>& op, const Tile& tile, int row, bool reports) {
    int64_t target = tile.first + min(row, tile.rows - 1);
    if (op.item_ids.data != nullptr) {
        target = op.item_ids[target];
        if (!is_row(target, op.items)) {
            if (reports && row < tile.rows && blockIdx.y == 0 && blockIdx.z == 0) report(op);
            return nullptr;
        }
    }
    return op.targets + target * op.target_row + blockIdx.y * op.target_head;
}

// Zeros in some columns of this block's head.
template <class T>
__device__ void store_zeros(const Operands<T>& op, int64_t first_row, int64_t rows, int first_column, int columns) {
    T* out = op.out + (first_row * op.heads + blockIdx.y) * op.value_dim + first_column;
#pragma unroll 1
    for (int64_t row = 0; row < rows; ++row, out += op.heads * op.value_dim) {
#pragma unroll 1
        for (int i = threadIdx.x; i < columns; i += blockDim.x) store(0.f, out + i);
    }
}

// The rows before the first user's and behind the last's, which no tile has.
template <class T>
__device__ void store_nobodys_rows(const Operands<T>& op, int first_column, int columns) {
    if (op.invalid == nullptr || blockIdx.x > 0) return;
    const int64_t begin = offset_of(op, 0), end = offset_of(op, op.users);
    store_zeros(op, 0, begin, first_column, columns);
    store_zeros(op, end, op.rows - end, first_column, columns);
}

__device__ inline float leaky_relu(float x, float negative_slope) { return x > 0.f ? x : x * negative_slope; }

}  // namespace recattn
