// Arguments of the lrea_absorbed_attention kernels, and the tile of candidates that a block computes.
//
// A block computes one tile of one head: at most 2^log2_tile_rows candidates of one user. User u has the tiles from
// (offsets[u] >> log2_tile_rows) + u up to the first tile of user u+1. These are as many as its rows need, or one more,
// which is empty. So a block finds its user by binary search in the offsets, without a table of tiles.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "convert.h"

namespace recattn {

constexpr int kLanes = 32;

struct Indices {
    const void* data;  // null if not given
    bool is_int64;

    __device__ int64_t operator[](int64_t i) const {
        return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    }
};

// [S, H, r, d] in the targets' dtype, half precision beside float, or int8 with a scale for each row.
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
    unsigned long long* invalid;  // counts indices out of range; if null, such an index stops the kernel
    int64_t rows, items, users, heads, table_size;
    int rank, query_dim, value_dim, log2_tile_rows;
    float negative_slope;
};

// What a block computes: one tile of one head. Heads lie next to each other in the grid, so that the blocks that run at
// a time share rows of memory.
struct Block {
    int tile, head;
};

template <class T>
__device__ Block block_of(const Operands<T>& op) {
    const auto heads = static_cast<unsigned>(op.heads);
    return {static_cast<int>(blockIdx.x / heads), static_cast<int>(blockIdx.x % heads)};
}

// Rows first .. first+rows of the output, all of one user, and the head. slot = -1 if the user's slot is out of range.
struct Tile {
    int64_t first, slot;
    int rows, head;
};

__device__ inline bool is_row(int64_t index, int64_t table_size) {
    return static_cast<uint64_t>(index) < static_cast<uint64_t>(table_size);
}

// Counts an index out of range, or stops the kernel, as PyTorch's kernels do.
template <class T>
__device__ void report_invalid(const Operands<T>& op) {
    if (op.invalid == nullptr) __trap();
    atomicAdd(op.invalid, 1ull);
}

// Each block checks one range of users; the blocks of the first head together check all.
template <class T>
__device__ void check_users(const Operands<T>& op, Block block) {
    const int64_t user = static_cast<int64_t>(block.tile) * blockDim.x + threadIdx.x;
    if (user >= op.users || block.head > 0) return;
    const int64_t begin = op.offsets[user], end = op.offsets[user + 1];
    if (begin > end || (user == 0 && begin != 0) || (user == op.users - 1 && end != op.rows)) report_invalid(op);
    if (!is_row(op.slots[user], op.table_size)) report_invalid(op);
}

// An offset, clamped to the rows of the output.
template <class T>
__device__ int64_t offset_of(const Operands<T>& op, int64_t user) {
    return max(int64_t{0}, min(op.offsets[user], op.rows));
}

// The last user whose tiles begin at or before `tile`; a search with 32 probes at a time. For invalid (descending)
// offsets several users may qualify. The one found never decreases from tile to tile, so every row gets a tile.
template <class T>
__device__ int find_user(const Operands<T>& op, int tile) {
    unsigned low = 0, high = static_cast<unsigned>(op.users);  // a tile has a number of 31 bits, and so has a user
    while (high - low > 1) {
        const unsigned step = (high - low + kLanes - 1) / kLanes;
        const unsigned lane = threadIdx.x % kLanes, probe = low + lane * step;
        const bool before =
            lane == 0 || (probe < high && static_cast<unsigned>(offset_of(op, probe) >> op.log2_tile_rows) + probe <=
                                              static_cast<unsigned>(tile));
        low += (kLanes - 1 - __clz(__ballot_sync(0xffffffff, before))) * step;
        high = min(high, low + step);
    }
    return static_cast<int>(low);
}

template <class T>
__device__ Tile find_tile(const Operands<T>& op, Block block) {
    const int user = find_user(op, block.tile);
    const int64_t begin = offset_of(op, user), end = offset_of(op, user + 1), slot = op.slots[user];
    const int64_t first = begin + ((block.tile - user - (begin >> op.log2_tile_rows)) << op.log2_tile_rows);
    if (first < begin || first >= end) return {first, 0, 0, block.head};
    return {first, is_row(slot, op.table_size) ? slot : -1,
            static_cast<int>(min(end - first, static_cast<int64_t>(1) << op.log2_tile_rows)), block.head};
}

// Address of the target of a tile's row (rows beyond the tile: its last row); null if the item id is out of range.
template <class T>
__device__ const T* target_of(const Operands<T>& op, const Tile& tile, int row, bool reports) {
    int64_t target = tile.first + min(row, tile.rows - 1);
    if (op.item_ids.data != nullptr) {
        target = op.item_ids[target];
        if (!is_row(target, op.items)) {
            if (reports && row < tile.rows && tile.head == 0) report_invalid(op);
            return nullptr;
        }
    }
    return op.targets + target * op.target_row + tile.head * op.target_head;
}

// Stores zeros in some rows of one head.
template <class T>
__device__ void store_zeros(const Operands<T>& op, int64_t first_row, int64_t rows, int head) {
    T* out = op.out + (first_row * op.heads + head) * op.value_dim;
#pragma unroll 1
    for (int64_t row = 0; row < rows; ++row, out += op.heads * op.value_dim) {
#pragma unroll 1
        for (int i = threadIdx.x; i < op.value_dim; i += blockDim.x) store(0.f, out + i);
    }
}

// Stores zeros in the rows before the first user's and after the last user's, which are in no tile.
template <class T>
__device__ void store_unowned_rows(const Operands<T>& op, Block block) {
    if (op.invalid == nullptr || block.tile > 0) return;
    const int64_t begin = offset_of(op, 0), end = offset_of(op, op.users);
    store_zeros(op, 0, begin, block.head);
    store_zeros(op, end, op.rows - end, block.head);
}

__device__ inline float leaky_relu(float x, float negative_slope) { return x > 0.f ? x : x * negative_slope; }

}  // namespace recattn
