// h = leaky_relu(q keys^T) values for a ragged batch of candidates, each user's state read where it lies in the tables.
//
// A block takes kRows consecutive candidates of one head, whichever users they belong to, and kColumns columns of the
// output. It walks the rank in steps of a warp: lane k holds the score of rank row k, then shares it with the others.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "lrea_absorbed_attention.h"

namespace recattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kLanes = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;
constexpr int kBlocksPerProcessor = 4;  // leaves each thread 128 registers
constexpr int kRowsPerWarp = 4;
constexpr int kRows = kWarps * kRowsPerWarp;
constexpr int kDepth = 64;  // columns of q and keys that are staged at a time
constexpr int kColumnsPerLane = 4;
constexpr int kColumns = kColumnsPerLane * kLanes;

struct Indices {
    const void* data;
    bool is_int64;

    __device__ int64_t operator[](int64_t i) const {
        return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    }
};

template <class T>
struct StateTable {
    const T* data;
    int64_t slot, head, row, column;
};

template <class T>
struct AbsorbedAttention {
    const T* targets;
    int64_t target_row, target_head, target_column;
    StateTable<T> keys, values;
    Indices slots, offsets;
    T* out;  // [T, H, dv]
    int64_t rows, users, heads, table_size;
    int rank, query_dim, value_dim;
    float negative_slope;
};

// By name, for torch builds extensions without the implicit conversions of CUDA's half types.
__device__ float to_float(float value) { return value; }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ void store(float value, float* out) { *out = value; }
__device__ void store(float value, __half* out) { *out = __float2half(value); }
__device__ void store(float value, __nv_bfloat16* out) { *out = __float2bfloat16(value); }

// The user of a candidate: the last one whose targets begin at or before it.
__device__ int64_t find_user(const Indices& offsets, int64_t users, int64_t row) {
    int64_t low = 0, high = users;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (offsets[middle] <= row ? low : high) = middle;
    }
    return low;
}

// out[m, n] = in[m, n] in float, zero beyond `rows` and `columns`; the whole block takes part.
template <int kStride, int kWidth, class T>
__device__ void stage(const T* in, int64_t in_row, int64_t in_column, int rows, int columns, int staged_rows,
                      float (*out)[kStride]) {
    for (int i = threadIdx.x; i < staged_rows * kWidth; i += kThreads) {
        const int m = i / kWidth, n = i % kWidth;
        out[m][n] = m < rows && n < columns ? to_float(in[m * in_row + n * in_column]) : 0.f;
    }
}

template <class T>
struct SharedMemory {
    float targets[kRows][kDepth];
    float keys[kLanes][kDepth + 1];  // lanes read a column each: an odd stride keeps them in different banks
    float values[kLanes][kColumns];
};

// Rows first..first+rows of one user, rows <= kRows.
template <class T>
__device__ void attend_user(const AbsorbedAttention<T>& op, SharedMemory<T>& shared, int64_t slot, int head,
                            int64_t first, int rows, int first_column) {
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const T* targets = op.targets + first * op.target_row + head * op.target_head;
    const T* keys = op.keys.data + slot * op.keys.slot + head * op.keys.head;
    const T* values = op.values.data + slot * op.values.slot + head * op.values.head;
    const int columns = min(kColumns, op.value_dim - first_column);
    float acc[kRowsPerWarp][kColumnsPerLane] = {};
    for (int k = 0; k < op.rank; k += kLanes) {
        const int ranks = min(kLanes, op.rank - k);
        float scores[kRowsPerWarp] = {};  // of rank row k + lane
        for (int c = 0; c < op.query_dim; c += kDepth) {
            const int depth = min(kDepth, op.query_dim - c);
            __syncthreads();
            stage<kDepth, kDepth>(targets + c * op.target_column, op.target_row, op.target_column, rows, depth, kRows,
                                  shared.targets);
            stage<kDepth + 1, kDepth>(keys + k * op.keys.row + c * op.keys.column, op.keys.row, op.keys.column, ranks,
                                      depth, kLanes, shared.keys);
            __syncthreads();
            for (int i = 0; i < depth; ++i) {
                const float key = shared.keys[lane][i];
#pragma unroll
                for (int m = 0; m < kRowsPerWarp; ++m) scores[m] += shared.targets[warp * kRowsPerWarp + m][i] * key;
            }
        }
#pragma unroll
        for (int m = 0; m < kRowsPerWarp; ++m) scores[m] = scores[m] > 0.f ? scores[m] : scores[m] * op.negative_slope;
        __syncthreads();
        stage<kColumns, kColumns>(values + k * op.values.row + first_column * op.values.column, op.values.row,
                                  op.values.column, ranks, columns, kLanes, shared.values);
        __syncthreads();
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
        T* out = op.out + ((first + row) * op.heads + head) * op.value_dim + first_column;
#pragma unroll
        for (int n = 0; n < kColumnsPerLane; ++n) {
            const int column = n * kLanes + lane;
            if (row < rows && column < columns) store(acc[m][n], out + column);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    lrea_absorbed_attention_kernel(const AbsorbedAttention<T> op) {
    __shared__ SharedMemory<T> shared;
    const int head = blockIdx.y, first_column = blockIdx.z * kColumns;
    int64_t row = static_cast<int64_t>(blockIdx.x) * kRows;
    const int64_t end = min(row + kRows, op.rows);
    for (int64_t user = find_user(op.offsets, op.users, row); row < end; ++user) {
        // A batch that does not fit its tables stops here, as an index out of range does in PyTorch.
        if (user >= op.users || op.offsets[user] > row) __trap();
        const int64_t stop = min(end, op.offsets[user + 1]);
        if (stop <= row) continue;
        const int64_t slot = op.slots[user];
        if (slot < 0 || slot >= op.table_size) __trap();
        attend_user(op, shared, slot, head, row, static_cast<int>(stop - row), first_column);
        row = stop;
    }
}

template <class T>
void launch(const Tensor& targets, const Tensor& keys, const Tensor& values, const Tensor& slots, const Tensor& offsets,
            const Tensor& out, const AbsorbedSizes& sizes, double negative_slope) {
    const auto table = [](const Tensor& t) {
        return StateTable<T>{static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2),
                             t.stride(3)};
    };
    const auto indices = [](const Tensor& t) {
        return Indices{t.const_data_ptr(), t.scalar_type() == ScalarType::Long};
    };
    const AbsorbedAttention<T> op{static_cast<const T*>(targets.const_data_ptr()),
                                  targets.stride(0),
                                  targets.stride(1),
                                  targets.stride(2),
                                  table(keys),
                                  table(values),
                                  indices(slots),
                                  indices(offsets),
                                  static_cast<T*>(out.mutable_data_ptr()),
                                  sizes.rows,
                                  sizes.users,
                                  sizes.heads,
                                  sizes.slots,
                                  static_cast<int>(sizes.rank),
                                  static_cast<int>(sizes.query_dim),
                                  static_cast<int>(sizes.value_dim),
                                  static_cast<float>(negative_slope)};
    const auto blocks = [](int64_t size, int64_t block) { return static_cast<unsigned>((size + block - 1) / block); };
    const dim3 grid(blocks(sizes.rows, kRows), static_cast<unsigned>(sizes.heads), blocks(sizes.value_dim, kColumns));
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(targets.get_device_index(), &stream));
    lrea_absorbed_attention_kernel<T><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "lrea_absorbed_attention did not start: ", cudaGetErrorString(error));
}

void expect_on_device(const char* name, const Tensor& tensor, const Tensor& targets) {
    expect(tensor.is_cuda() && tensor.get_device_index() == targets.get_device_index(), name,
           " must be on targets' device");
}

Tensor lrea_absorbed_attention(const Tensor& targets, const Tensor& state_keys, const Tensor& state_values,
                               const Tensor& slots, const Tensor& target_offsets, double negative_slope) {
    const AbsorbedSizes sizes = check_absorbed(targets, state_keys, state_values, slots, target_offsets);
    expect_on_device("state_keys", state_keys, targets);
    expect_on_device("state_values", state_values, targets);
    expect_on_device("slots", slots, targets);
    expect_on_device("target_offsets", target_offsets, targets);
    constexpr int64_t kMostBlocks = 65535;  // of a grid along y and z
    expect(sizes.heads <= kMostBlocks, "targets must have at most ", kMostBlocks, " heads, got ", sizes.heads);
    expect(std::max({sizes.rank, sizes.query_dim, sizes.value_dim}) <= kMostBlocks, "rank and widths must be at most ",
           kMostBlocks, ", got r = ", sizes.rank, ", d = ", sizes.query_dim, ", dv = ", sizes.value_dim);
    const torch::stable::accelerator::DeviceGuard guard(targets.get_device_index());
    const Tensor out = torch::stable::new_empty(targets, {sizes.rows, sizes.heads, sizes.value_dim});
    if (out.numel() == 0) return out;
    expect(sizes.users > 0, "target_offsets must be offsets from 0 to ", sizes.rows, ", got offsets of no user");
    const Tensor slots_row = torch::stable::contiguous(slots), offsets_row = torch::stable::contiguous(target_offsets);
    const auto run = [&](auto zero) {
        launch<decltype(zero)>(targets, state_keys, state_values, slots_row, offsets_row, out, sizes, negative_slope);
    };
    switch (targets.scalar_type()) {
        case ScalarType::Float:
            run(float{});
            break;
        case ScalarType::Half:
            run(__half{});
            break;
        case ScalarType::BFloat16:
            run(__nv_bfloat16{});
            break;
        default:
            expect(false, "targets must be float32 or bfloat16 or float16, got ", targets.scalar_type());
    }
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CUDA, m) { m.impl("lrea_absorbed_attention", TORCH_BOX(&lrea_absorbed_attention)); }

}  // namespace
}  // namespace recattn
