// lrea_absorbed_attention on tensor cores: half-precision targets, rows of whole 16-byte pieces.
//
//   h[t] = leaky_relu(q[t] keys^T) values      keys [r, d], values [r, dv]: the state of t's user, this head
//
// One block: 2^kLog2TileRows = 128 candidates of one user and one head. It stages the user's state in shared memory.
// One warp: 16 candidates. It loads q from global memory into registers, kSlab columns ahead:
//   scores  = q keys^T            [16, kRank]
//   weights = leaky_relu(scores)  [16, kRank], packed to half precision
//   out     = weights values      [16, kGroup] at a time
//
// A product may sum in any order and compute its columns in any order. The order is chosen so that a lane reads and
// writes 8 neighbours (16 bytes) at a time. With t = lane % 4, for each 32 columns:
//   scores   lane t has columns 8t .. 8t+7 of its rows of q and keys, as 4 words; product i takes words 2i and 2i+1
//   out      column n of product j is column 4n + j of `out`, so the four products of a lane hold columns 8t .. 8t+7
// Rank and widths are padded with zeros.
#pragma once

#include <type_traits>

#include "absorbed_operands.h"
#include "convert.h"
#include "cuda/mma.h"
#include "cuda/shared_memory.h"

namespace recattn::mma {

constexpr int kMaxRank = 64, kMaxWidth = 256;
constexpr int kPiece = 8;         // elements of one 16-byte access
constexpr int kRowsPerWarp = 16;  // rows of one tensor-core product
constexpr int kLog2TileRows = 7;
constexpr int kWarps = (1 << kLog2TileRows) / kRowsPerWarp;
constexpr int kThreads = kWarps * kLanes;
constexpr int kGroup = 32;  // columns covered by the pieces of four lanes
constexpr int kSlabGroups = 2;
constexpr int kSlab = kSlabGroups * kGroup;  // columns of q that are loaded ahead
constexpr int kStagingLanes = 8;             // threads that stage one row
constexpr int kStagingRows = kThreads / kStagingLanes;

// What lies before the state in shared memory: its scales, and the tile, which would take registers meanwhile.
template <int kRank>
struct alignas(16) Header {
    float2 scales[kRank];
    Tile tile;
};

// A state in shared memory, behind the header: keys [kRank, key_stride], values [kRank, value_stride].
template <int kRank>
struct Layout {
    int width, key_stride, value_stride;  // in elements of two bytes

    // Strides without bank conflicts: at a time, 8 lanes read 64 bytes from each of two rows of keys, and 16 lanes read
    // 32 bytes from each of four rows of values, every second row.
    __host__ __device__ Layout(int query_dim, int value_dim)
        : width(((query_dim > value_dim ? query_dim : value_dim) + kGroup - 1) / kGroup * kGroup),
          key_stride(width / 64 * 64 + 32),
          value_stride(width + 8) {}
    __host__ __device__ int bytes() const {
        return static_cast<int>(sizeof(Header<kRank>)) + kRank * (key_stride + value_stride) * 2;
    }
};

// Eight numbers of a state. widen() converts them to half precision, exactly also for int8.
template <class State>
using Piece = std::conditional_t<std::is_same_v<State, int8_t>, uint2, uint4>;

template <class T>
__device__ uint4 widen(uint4 piece) {
    return piece;
}

template <class T>
__device__ uint4 widen(uint2 piece) {
    int8_t numbers[kPiece];
    memcpy(numbers, &piece, sizeof piece);
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack<T>(to_float(numbers[2 * i]), to_float(numbers[2 * i + 1]));
    return {words[0], words[1], words[2], words[3]};
}

// One thread's pieces of a user's state: one in every kStagingRows-th row; zeros beyond the rank and the width.
template <class State, int kRank>
struct StatePieces {
    static constexpr int kPieces = (kRank + kStagingRows - 1) / kStagingRows;
    Piece<State> pieces[kPieces];

    // Loads without a branch, so that all loads are issued before the first is waited for.
    __device__ StatePieces(const StateTable& table, int64_t slot, int head, int rank, int width, int column) {
        const State* state = static_cast<const State*>(table.data) + slot * table.slot + head * table.head;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const int row = threadIdx.x / kStagingLanes + i * kStagingRows;
            const bool inside = row < rank && column < width;
            const auto piece = *reinterpret_cast<const Piece<State>*>(state + (inside ? row * table.row + column : 0));
            pieces[i] = inside ? piece : Piece<State>{};
        }
    }

    template <class T>
    __device__ void store(T* shared, int stride) const {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const int row = threadIdx.x / kStagingLanes + i * kStagingRows;
            *reinterpret_cast<uint4*>(shared + row * stride) = widen<T>(pieces[i]);
        }
    }
};

template <class State, class T, int kRank>
__device__ void stage(const Operands<T>& op, const Layout<kRank>& layout, int64_t slot, int head, T* keys, T* values) {
    if (threadIdx.x >= kRank * kStagingLanes) return;
#pragma unroll 1
    for (int column = threadIdx.x % kStagingLanes * kPiece; column < layout.width; column += kStagingLanes * kPiece) {
        const StatePieces<State, kRank> of_keys(op.keys, slot, head, op.rank, op.query_dim, column);
        const StatePieces<State, kRank> of_values(op.values, slot, head, op.rank, op.value_dim, column);
        of_keys.store(keys + column, layout.key_stride);
        of_values.store(values + column, layout.value_stride);
    }
}

// All scales of a user's state, (key, value) per rank row, spread over the lanes of each warp; zeros beyond the rank.
template <int kRank>
struct Scales {
    static constexpr int kPerLane = (kRank + kLanes - 1) / kLanes;
    float2 mine[kPerLane];

    __device__ Scales(const StateTable& keys, const StateTable& values, int64_t slot, int head, int rank) {
        const float* of_keys = keys.scales + slot * keys.scale_slot + head * keys.scale_head;
        const float* of_values = values.scales + slot * values.scale_slot + head * values.scale_head;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const int k = threadIdx.x % kLanes + i * kLanes;
            mine[i] = k < rank ? float2{of_keys[k * keys.scale_row], of_values[k * values.scale_row]} : float2{};
        }
    }

    // Divides the value scales by the largest of them and returns it, so that the weights do not underflow in float16.
    __device__ float normalize() {
        float largest = 0.f;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) largest = fmaxf(largest, fabsf(mine[i].y));
#pragma unroll
        for (int i = kLanes / 2; i > 0; i /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, i));
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) mine[i].y = largest > 0.f ? mine[i].y / largest : mine[i].y;  // 0, or NaN
        return largest;
    }

    __device__ void store(float2* shared) const {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const int k = threadIdx.x + i * kLanes;
            if (threadIdx.x < kLanes && k < kRank) shared[k] = mine[i];
        }
    }
};

// One lane's part of kSlab columns of 16 candidates: pieces of rows g and g+8. Zeros beyond the width and for a null
// row.
struct Slab {
    uint4 low[kSlabGroups], high[kSlabGroups];

    template <class T>
    __device__ Slab(const T* low_row, const T* high_row, int first_column, int width) {
#pragma unroll
        for (int i = 0; i < kSlabGroups; ++i) {
            const int column = first_column + i * kGroup + threadIdx.x % 4 * kPiece;
            const bool inside = column < width;
            low[i] = inside && low_row != nullptr ? *reinterpret_cast<const uint4*>(low_row + column) : uint4{};
            high[i] = inside && high_row != nullptr ? *reinterpret_cast<const uint4*>(high_row + column) : uint4{};
        }
    }
};

// scores += q keys^T over one slab. `keys` points at the slab's first column; `width` columns are left from there.
template <class T, int kRank>
__device__ void add_scores(const Slab& slab, const T* keys, int stride, int width, float (&scores)[kRank / 8][4]) {
    const int lane = threadIdx.x % kLanes;
#pragma unroll
    for (int i = 0; i < kSlabGroups; ++i) {
        if (i * kGroup >= width) break;
        const uint4 low = slab.low[i], high = slab.high[i];
        uint4 key[kRank / 8];
#pragma unroll
        for (int n = 0; n < kRank / 8; ++n) {
            const int row = n * 8 + lane / 4, column = i * kGroup + lane % 4 * kPiece;
            key[n] = *reinterpret_cast<const uint4*>(keys + row * stride + column);
        }
#pragma unroll
        for (int n = 0; n < kRank / 8; ++n) {
            multiply_add<T>(scores[n], {low.x, high.x, low.y, high.y}, key[n].x, key[n].y);
        }
#pragma unroll
        for (int n = 0; n < kRank / 8; ++n) {
            multiply_add<T>(scores[n], {low.z, high.z, low.w, high.w}, key[n].z, key[n].w);
        }
    }
}

// weights = leaky_relu(scores), as the A operand of the second product. kScaled: int8 states, with scales.
template <class T, bool kScaled, int kRank>
__device__ void apply_leaky_relu(float negative_slope, const float2* scales, float (&scores)[kRank / 8][4],
                                 uint32_t (&weights)[kRank / 16][4]) {
#pragma unroll
    for (int n = 0; n < kRank / 8; ++n) {
        float (&s)[4] = scores[n];
        const float2* pair = scales + n * 8 + threadIdx.x % 4 * 2;  // scales of the lane's two columns
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (kScaled) s[i] *= pair[i % 2].x;
            s[i] = leaky_relu(s[i], negative_slope);
            if constexpr (kScaled) s[i] *= pair[i % 2].y;
        }
        weights[n / 2][n % 2 * 2] = pack<T>(s[0], s[1]);
        weights[n / 2][n % 2 * 2 + 1] = pack<T>(s[2], s[3]);
    }
}

// acc[j][c] = (weights values)[g or g+8, 4n + j] with n = 2t or 2t+1, for kGroup columns from `values` on.
template <class T, int kRank>
__device__ void multiply_values(const uint32_t (&weights)[kRank / 16][4], const T* values, int stride,
                                float (&acc)[4][4]) {
    const int lane = threadIdx.x % kLanes;
#pragma unroll
    for (int k = 0; k < kRank / 16; ++k) {
        uint32_t pairs[2][4];  // column j of two neighbouring rows
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const T* row = values + (k * 16 + half * 8 + lane % 4 * 2) * stride + lane / 4 * 4;
            const uint2 even = *reinterpret_cast<const uint2*>(row),
                        odd = *reinterpret_cast<const uint2*>(row + stride);
            pairs[half][0] = __byte_perm(even.x, odd.x, 0x5410);
            pairs[half][1] = __byte_perm(even.x, odd.x, 0x7632);
            pairs[half][2] = __byte_perm(even.y, odd.y, 0x5410);
            pairs[half][3] = __byte_perm(even.y, odd.y, 0x7632);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_add<T>(acc[j], weights[k], pairs[0][j], pairs[1][j]);
    }
}

// Stores eight neighbouring columns of one row: acc[0..3][i], then acc[0..3][i+1].
template <class T>
__device__ void store_piece(const float (&acc)[4][4], int i, float scale, T* out) {
    const uint4 piece{pack<T>(acc[0][i] * scale, acc[1][i] * scale), pack<T>(acc[2][i] * scale, acc[3][i] * scale),
                      pack<T>(acc[0][i + 1] * scale, acc[1][i + 1] * scale),
                      pack<T>(acc[2][i + 1] * scale, acc[3][i + 1] * scale)};
    __stcg(reinterpret_cast<uint4*>(out), piece);  // one 16-byte store; a plain assignment becomes four
}

template <class T, class State, int kRank>
__global__ void __launch_bounds__(kThreads, kRank <= 32 ? 4 : 2) absorbed_attention_kernel(const Operands<T> op) {
    constexpr bool kScaled = std::is_same_v<State, int8_t>;
    RECATTN_DYNAMIC_SHARED_MEMORY(uint4, shared);
    const Block block = block_of(op);
    check_users(op, block);
    store_unowned_rows(op, block);
    const Tile tile = find_tile(op, block);
    if (tile.rows == 0) return;
    const int head = tile.head, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const Layout<kRank> layout(op.query_dim, op.value_dim);
    auto* header = reinterpret_cast<Header<kRank>*>(shared);
    T* keys = reinterpret_cast<T*>(header + 1);
    T* values = keys + kRank * layout.key_stride;
    if (threadIdx.x == 0) header->tile = tile;

    const int row = warp * kRowsPerWarp + lane / 4, high_row = row + kRowsPerWarp / 2;
    const T* low_target = target_of(op, tile, row, lane % 4 == 0);
    const T* high_target = target_of(op, tile, high_row, lane % 4 == 0);
    if (tile.slot < 0) return store_zeros(op, tile.first, tile.rows, head);
    Slab slab(low_target, high_target, 0, op.query_dim);  // loads while the state is staged
    float scale = 1.f;
    if constexpr (kScaled) {
        Scales<kRank> of_user(op.keys, op.values, tile.slot, head, op.rank);
        stage<State>(op, layout, tile.slot, head, keys, values);
        scale = of_user.normalize();
        of_user.store(header->scales);
    } else {
        stage<State>(op, layout, tile.slot, head, keys, values);
    }
    __syncthreads();
    const int rows = header->tile.rows;
    if (warp * kRowsPerWarp >= rows) return;

    float scores[kRank / 8][4] = {};
#pragma unroll 1
    for (int column = 0; column < op.query_dim; column += kSlab) {
        add_scores<T, kRank>(slab, keys + column, layout.key_stride, op.query_dim - column, scores);
        if (column + kSlab < op.query_dim) slab = Slab(low_target, high_target, column + kSlab, op.query_dim);
    }
    uint32_t weights[kRank / 16][4];
    apply_leaky_relu<T, kScaled, kRank>(op.negative_slope, header->scales, scores, weights);
    const int64_t out_row = op.heads * op.value_dim;
    T* out = op.out + (header->tile.first + row) * out_row + header->tile.head * op.value_dim;
#pragma unroll 1
    for (int column = 0; column < op.value_dim; column += kGroup) {
        float acc[4][4] = {};
        multiply_values<T, kRank>(weights, values + column, layout.value_stride, acc);
        const int mine = column + lane % 4 * kPiece;
        const bool inside = mine < op.value_dim;
        if (inside && row < rows) store_piece(acc, 0, scale, out + mine);
        if (inside && high_row < rows) store_piece(acc, 2, scale, out + kRowsPerWarp / 2 * out_row + mine);
    }
}

}  // namespace recattn::mma
