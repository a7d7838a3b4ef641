// lrea_absorbed_attention with float multiply-adds: any dtype, sizes and strides.
//
//   h[t] = leaky_relu(q[t] keys^T) values      keys [r, d], values [r, dv]: the state of t's user, this head
//
// One block: 2^kLog2TileRows = 128 candidates of one user and one head. It stages the user's state in shared memory.
// One warp: 32 candidates. For each 32 columns of h and each 32 rows of the rank:
//   scores  = leaky_relu(q keys^T)  [32, 32]   in slabs of 32 columns of q and keys
//   acc    += scores values         [32, 32]
// One lane: rows m, m+4 .. m+28 of both, columns n, n+8 .. n+24 of the scores and 4n .. 4n+3 of acc. For 128 products
// it reads twelve times 16 bytes of shared memory.
#pragma once

#include <type_traits>

#include "absorbed_operands.h"
#include "convert.h"
#include "cuda/shared_memory.h"

namespace recattn::fma {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;
constexpr int kBlocksPerProcessor = 4;          // so that a thread gets 128 registers
constexpr int kQuad = 4;                        // numbers of one 16-byte access
constexpr int kRowLanes = 4, kColumnLanes = 8;  // lanes along the rows and the columns of a product
constexpr int kRowsPerLane = 8;
constexpr int kRowsPerWarp = kRowLanes * kRowsPerLane;
constexpr int kLog2TileRows = 7;
constexpr int kWidth = kColumnLanes * kQuad;  // rank rows, and columns of q and of the output, taken at a time
constexpr int kInFlight = 4;                  // loads before the first is waited for: more take registers, and spill
static_assert(kRowLanes * kColumnLanes == kLanes && 1 << kLog2TileRows == kWarps * kRowsPerWarp);

// Strides for which lanes that read or write together hit different banks.
constexpr int kKeyStride = kWidth + 4, kLeftStride = kWidth + 8;

struct SharedMemory {
    int64_t rows[kWarps][kRowsPerWarp];  // offset of a candidate in targets; -1 for a row of zeros
    alignas(16) float keys[kWidth][kKeyStride];
    alignas(16) float values[kWidth][kWidth];
    alignas(16) float left[kWarps][kRowsPerWarp][kLeftStride];  // a warp's slab of q, then its scores
};

// Copies a tile [kTileRows, kWidth] from global to shared memory in pieces of kPiece neighbours; kSharers threads share
// it. Row m begins row(m) behind `data`, and is zeros where that is negative. scale(m) multiplies it if it is int8.
template <int kTileRows, int kPiece, int kSharers, class State, int kStride, class Row, class Scale>
__device__ void stage(const State* data, int columns, int64_t column_stride, float (*out)[kStride], const Row& row,
                      const Scale& scale) {
    constexpr int kPieces = kWidth / kPiece, kStep = kSharers / kPieces, kCount = kTileRows / kStep;
    constexpr int kBatch = kCount < kInFlight ? kCount : kInFlight;
    struct alignas(kPiece * sizeof(State)) Piece {
        State numbers[kPiece];
    };
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // or the address of every row is kept in registers, for the next call
    const int first = thread % kSharers / kPieces, column = thread % kPieces * kPiece;
    data += kPiece == 1 ? column * column_stride : column;
#pragma unroll 1
    for (int batch = first; batch < kTileRows; batch += kBatch * kStep) {
        Piece pieces[kBatch] = {};
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int64_t begin = row(batch + i * kStep);
            if (column < columns && begin >= 0) pieces[i] = *reinterpret_cast<const Piece*>(data + begin);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int m = batch + i * kStep;
            float numbers[kPiece];
#pragma unroll
            for (int l = 0; l < kPiece; ++l) numbers[l] = to_float(pieces[i].numbers[l]);
            if constexpr (std::is_same_v<State, int8_t>) {
                const float factor = column < columns ? scale(m) : 0.f;
#pragma unroll
                for (int l = 0; l < kPiece; ++l) numbers[l] *= factor;
            }
            if constexpr (kPiece == kQuad) {
                *reinterpret_cast<float4*>(&out[m][column]) = {numbers[0], numbers[1], numbers[2], numbers[3]};
            } else {
                out[m][column] = numbers[0];
            }
        }
    }
}

// Stages `rows` rank rows of a user's state from `first` on, some columns from `first_column` on; dequantizes int8.
template <class State, int kPiece, int kStride>
__device__ void stage_state(const StateTable& table, const Tile& tile, int first, int rows, int first_column,
                            int columns, float (*out)[kStride]) {
    const int64_t start =
        tile.slot * table.slot + tile.head * table.head + first * table.row + first_column * table.column;
    const auto row = [&](int m) { return m < rows ? m * table.row : -1; };
    if (table.scales == nullptr) {
        stage<kWidth, kPiece, kThreads>(static_cast<const State*>(table.data) + start, columns, table.column, out, row,
                                        [](int) { return 1.f; });
    } else {
        const float* scales =
            table.scales + tile.slot * table.scale_slot + tile.head * table.scale_head + first * table.scale_row;
        stage<kWidth, kPiece, kThreads>(static_cast<const int8_t*>(table.data) + start, columns, table.column, out, row,
                                        [&](int m) { return m < rows ? scales[m * table.scale_row] : 0.f; });
    }
}

__device__ inline float4 read_quad(const float* address) { return *reinterpret_cast<const float4*>(address); }

template <class T>
__device__ void store_quad(const float* numbers, T* out) {
    struct alignas(kQuad * sizeof(T)) Quad {
        T numbers[kQuad];
    } quad;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) recattn::store(numbers[i], &quad.numbers[i]);
    *reinterpret_cast<Quad*>(out) = quad;
}

// scores += q keys^T over one slab, `depth` columns of which are not padding.
__device__ inline void add_scores(const float (*q)[kLeftStride], const float (*keys)[kKeyStride], int m, int n,
                                  int depth, float (&scores)[kRowsPerLane][kQuad]) {
#pragma unroll 1
    for (int c = 0; c < depth; c += kQuad) {
        float4 key[kQuad];
#pragma unroll
        for (int j = 0; j < kQuad; ++j) key[j] = read_quad(&keys[n + j * kColumnLanes][c]);
#pragma unroll
        for (int i = 0; i < kRowsPerLane; ++i) {
            const float4 target = read_quad(&q[m + i * kRowLanes][c]);
#pragma unroll
            for (int j = 0; j < kQuad; ++j) {
                scores[i][j] += target.x * key[j].x;
                scores[i][j] += target.y * key[j].y;
                scores[i][j] += target.z * key[j].z;
                scores[i][j] += target.w * key[j].w;
            }
        }
    }
}

// Leaves leaky_relu(scores) in shared memory, with zeros for padding of the rank.
__device__ inline void store_scores(const float (&scores)[kRowsPerLane][kQuad], float negative_slope, int m, int n,
                                    int ranks, float (*out)[kLeftStride]) {
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
            const int rank = n + j * kColumnLanes;
            out[m + i * kRowLanes][rank] = rank < ranks ? leaky_relu(scores[i][j], negative_slope) : 0.f;
        }
    }
}

// acc += scores values, over the first `ranks` rows of values; those up to a multiple of four are zeros.
__device__ inline void add_values(const float (*scores)[kLeftStride], const float (*values)[kWidth], int m, int n,
                                  int ranks, float (&acc)[kRowsPerLane][kQuad]) {
#pragma unroll 1
    for (int k = 0; k < ranks; k += kQuad) {
        float4 score[kRowsPerLane];
#pragma unroll
        for (int i = 0; i < kRowsPerLane; ++i) score[i] = read_quad(&scores[m + i * kRowLanes][k]);
#pragma unroll
        for (int l = 0; l < kQuad; ++l) {
            const float4 value = read_quad(&values[k + l][n * kQuad]);
#pragma unroll
            for (int i = 0; i < kRowsPerLane; ++i) {
                const float s = l == 0 ? score[i].x : l == 1 ? score[i].y : l == 2 ? score[i].z : score[i].w;
                acc[i][0] += s * value.x;
                acc[i][1] += s * value.y;
                acc[i][2] += s * value.z;
                acc[i][3] += s * value.w;
            }
        }
    }
}

// Targets T, states State unless they have scales: then int8. kPiece: 4 if rows can be read and written in aligned
// pieces of four numbers, else 1.
template <class T, class State, int kPiece>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) absorbed_attention_kernel(const Operands<T> op) {
    RECATTN_SHARED_MEMORY(SharedMemory, shared);
    const Block block = block_of(op);
    check_users(op, block);
    store_unowned_rows(op, block);
    const Tile tile = find_tile(op, block);
    if (tile.rows == 0) return;
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, first_row = warp * kRowsPerWarp;
    const bool has_rows = first_row < tile.rows;
    const T* target = first_row + lane < tile.rows ? target_of(op, tile, first_row + lane, true) : nullptr;
    int64_t* rows = shared.rows[warp];
    rows[lane] = target == nullptr ? -1 : target - op.targets;
    if (tile.slot < 0) return store_zeros(op, tile.first, tile.rows, tile.head);
    __syncwarp();
    // Lanes of a half-warp read at most 128 different bytes: every two have the same m, and every other two the same n.
    const int m = lane / 2 % 2 + lane / 16 * 2, n = lane % 2 + lane / 4 % 4 * 2;
    auto* left = shared.left[warp];
    for (int first_column = 0; first_column < op.value_dim; first_column += kWidth) {
        const int columns = min(kWidth, op.value_dim - first_column);
        float acc[kRowsPerLane][kQuad] = {};
        for (int k = 0; k < op.rank; k += kWidth) {
            const int ranks = min(kWidth, op.rank - k);
            if (first_column > 0 || k > 0) __syncthreads();
            stage_state<State, kPiece>(op.values, tile, k, ranks, first_column, columns, shared.values);
            if (first_column > 0 && op.rank <= kWidth) {  // the scores are those of the last columns
                __syncthreads();
            } else {
                float scores[kRowsPerLane][kQuad] = {};
                for (int c = 0; c == 0 || c < op.query_dim; c += kWidth) {
                    const int depth = min(kWidth, op.query_dim - c);
                    if (c > 0) __syncthreads();
                    stage_state<State, kPiece>(op.keys, tile, k, ranks, c, depth, shared.keys);
                    stage<kRowsPerWarp, kPiece, kLanes>(
                        op.targets + c * op.target_column, depth, op.target_column, left,
                        [&](int i) { return rows[i]; }, [](int) { return 1.f; });
                    __syncthreads();
                    if (has_rows) add_scores(left, shared.keys, m, n, depth, scores);
                }
                __syncwarp();
                if (has_rows) store_scores(scores, op.negative_slope, m, n, ranks, left);
                __syncwarp();
            }
            if (has_rows) add_values(left, shared.values, m, n, ranks, acc);
        }
        const int column = n * kQuad;
        T* out = op.out + ((tile.first + first_row + m) * op.heads + tile.head) * op.value_dim + first_column + column;
        const int64_t step = kRowLanes * op.heads * op.value_dim;
#pragma unroll
        for (int i = 0; i < kRowsPerLane; ++i) {
            if (first_row + m + i * kRowLanes < tile.rows) {
                if constexpr (kPiece == kQuad) {
                    if (column < columns) store_quad(acc[i], out);
                } else {
#pragma unroll
                    for (int l = 0; l < kQuad; ++l) {
                        if (column + l < columns) store(acc[i][l], out + l);
                    }
                }
            }
            out += step;
        }
    }
}

}  // namespace recattn::fma
