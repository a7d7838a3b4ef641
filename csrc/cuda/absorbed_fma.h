// lrea_absorbed_attention with float multiply-adds: any dtype, sizes and strides.
//
//   h[t] = leaky_relu(q[t] keys^T) values      keys [r, d], values [r, dv]: the state of t's user, this head
//
// One block: kRows candidates of one user, one head, kColumns columns of h. It loops over the rank, 32 rows at a time:
//   scores = q keys^T       in steps of kDepth columns of q and keys, staged in shared memory; lane k has rank row k
//   scores = leaky_relu(scores)
//   acc   += scores values  the lanes exchange their scores by shuffles
// One thread: kRowsPerWarp rows by kColumnsPerLane columns of acc.
#pragma once

#include "absorbed_operands.h"
#include "convert.h"
#include "cuda/shared_memory.h"

namespace recattn::fma {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;
constexpr int kBlocksPerProcessor = 4;  // so that a thread gets 128 registers
constexpr int kRowsPerWarp = 4;
constexpr int kLog2TileRows = 4;
constexpr int kRows = 1 << kLog2TileRows;
constexpr int kDepth = 64;  // columns of q and keys staged at a time
constexpr int kColumnsPerLane = 4;
constexpr int kColumns = kColumnsPerLane * kLanes;
static_assert(kRows == kWarps * kRowsPerWarp);

template <class T>
struct SharedMemory {
    const T* rows[kRows];  // null for a row of zeros
    float targets[kRows][kDepth];
    float keys[kLanes][kDepth + 1];  // odd stride: the lanes, which read one column each, hit different banks
    float values[kLanes][kColumns];
};

// out[m, n] = at(m, n), 0 beyond `rows` and `columns`. Called by the whole block.
template <int kStagedRows, int kWidth, int kStride, class At>
__device__ void stage(int rows, int columns, float (*out)[kStride], const At& at) {
#pragma unroll 4
    for (int i = threadIdx.x; i < kStagedRows * kWidth; i += kThreads) {
        const int m = i / kWidth, n = i % kWidth;
        out[m][n] = m < rows && n < columns ? at(m, n) : 0.f;
    }
}

// Stages rank rows first .. first+rows of a user's state, from `first_column` on; dequantizes int8.
template <class T, int kWidth, int kStride>
__device__ void stage_state(const StateTable& table, int64_t slot, int head, int first, int rows, int first_column,
                            int columns, float (*out)[kStride]) {
    const int64_t start = slot * table.slot + head * table.head + first * table.row + first_column * table.column;
    if (table.scales == nullptr) {
        const T* data = static_cast<const T*>(table.data) + start;
        stage<kLanes, kWidth>(rows, columns, out,
                              [&](int m, int n) { return to_float(data[m * table.row + n * table.column]); });
    } else {
        const int8_t* data = static_cast<const int8_t*>(table.data) + start;
        const float* scales =
            table.scales + slot * table.scale_slot + head * table.scale_head + first * table.scale_row;
        stage<kLanes, kWidth>(rows, columns, out, [&](int m, int n) {
            return to_float(data[m * table.row + n * table.column]) * scales[m * table.scale_row];
        });
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) absorbed_attention_kernel(const Operands<T> op) {
    RECATTN_SHARED_MEMORY(SharedMemory<T>, shared);
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const int head = blockIdx.y, first_column = blockIdx.z * kColumns;
    const int columns = min(kColumns, op.value_dim - first_column);
    check_users(op);
    store_unowned_rows(op, first_column, columns);
    const Tile tile = find_tile(op);
    if (tile.rows == 0) return;
    if (threadIdx.x < tile.rows) shared.rows[threadIdx.x] = target_of(op, tile, threadIdx.x, true);
    float acc[kRowsPerWarp][kColumnsPerLane] = {};
    // A user without a state gets the zeros of acc. (An early return here costs registers, and spills on sm_100.)
    for (int k = tile.slot < 0 ? op.rank : 0; k < op.rank; k += kLanes) {
        const int ranks = min(kLanes, op.rank - k);
        float scores[kRowsPerWarp] = {};  // of rank row k + lane
        for (int c = 0; c < op.query_dim; c += kDepth) {
            const int depth = min(kDepth, op.query_dim - c);
            __syncthreads();
            stage<kRows, kDepth>(tile.rows, depth, shared.targets, [&](int m, int n) {
                const T* row = shared.rows[m];
                return row != nullptr ? to_float(row[(c + n) * op.target_column]) : 0.f;
            });
            stage_state<T, kDepth>(op.keys, tile.slot, head, k, ranks, c, depth, shared.keys);
            __syncthreads();
#pragma unroll 4
            for (int i = 0; i < depth; ++i) {
                const float key = shared.keys[lane][i];
#pragma unroll
                for (int m = 0; m < kRowsPerWarp; ++m) scores[m] += shared.targets[warp * kRowsPerWarp + m][i] * key;
            }
        }
#pragma unroll
        for (int m = 0; m < kRowsPerWarp; ++m) scores[m] = leaky_relu(scores[m], op.negative_slope);
        __syncthreads();
        stage_state<T, kColumns>(op.values, tile.slot, head, k, ranks, first_column, columns, shared.values);
        __syncthreads();
#pragma unroll 4
        for (int i = 0; i < ranks; ++i) {
#pragma unroll
            for (int m = 0; m < kRowsPerWarp; ++m) {
                const float score = __shfl_sync(0xffffffff, scores[m], i);
#pragma unroll
                for (int n = 0; n < kColumnsPerLane; ++n) acc[m][n] += score * shared.values[i][n * kLanes + lane];
            }
        }
    }
#pragma unroll
    for (int m = 0; m < kRowsPerWarp; ++m) {
        const int row = warp * kRowsPerWarp + m;
        T* out = op.out + ((tile.first + row) * op.heads + head) * op.value_dim + first_column;
#pragma unroll
        for (int n = 0; n < kColumnsPerLane; ++n) {
            const int column = n * kLanes + lane;
            if (row < tile.rows && column < columns) store(acc[m][n], out + column);
        }
    }
}

}  // namespace recattn::fma
