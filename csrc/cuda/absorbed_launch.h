// Launches lrea_absorbed_attention: absorbed_mma.h if the caller says that the operands fit it, else absorbed_fma.h.
#pragma once

#include <climits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "absorbed_fma.h"
#include "absorbed_mma.h"
#include "common/expect.h"

namespace recattn {

inline void expect_success(cudaError_t error) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("lrea_absorbed_attention did not start: ") + cudaGetErrorString(error));
}

// grid = (tiles of candidates, heads, parts of the output's columns); tiles are defined in absorbed_operands.h.
template <class T>
void launch(void (*kernel)(Operands<T>), Operands<T> op, int log2_tile_rows, int threads, int64_t column_blocks,
            int shared_bytes, cudaStream_t stream) {
    op.log2_tile_rows = log2_tile_rows;
    const int64_t tiles = (op.rows >> log2_tile_rows) + op.users;
    expect(tiles <= INT_MAX, "targets and slots are too many for one launch: ", op.rows, " rows of ", op.users,
           " users");
    constexpr int kDefaultSharedBytes = 48 << 10;
    if (shared_bytes > kDefaultSharedBytes) {
        expect_success(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    }
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(op.heads),
                    static_cast<unsigned>(column_blocks));
    void* arguments[] = {&op};
    cudaLaunchKernel(kernel, grid, dim3(threads), arguments, shared_bytes, stream);
    expect_success(cudaGetLastError());  // also clears the error
}

template <class T>
void launch_fma(const Operands<T>& op, cudaStream_t stream) {
    const int64_t column_blocks = (op.value_dim + fma::kColumns - 1) / fma::kColumns;
    launch(fma::absorbed_attention_kernel<T>, op, fma::kLog2TileRows, fma::kThreads, column_blocks, 0, stream);
}

template <class T, class State, int kRank>
void launch_mma(const Operands<T>& op, cudaStream_t stream) {
    const int shared_bytes = mma::Layout<kRank>(op.query_dim, op.value_dim).bytes();
    launch(mma::absorbed_attention_kernel<T, State, kRank>, op, mma::kLog2TileRows, mma::kThreads, 1, shared_bytes,
           stream);
}

template <class T, class State>
void launch_mma(const Operands<T>& op, cudaStream_t stream) {
    const auto launch_rank = op.rank <= 16   ? launch_mma<T, State, 16>
                             : op.rank <= 32 ? launch_mma<T, State, 32>
                                             : launch_mma<T, State, mma::kMaxRank>;
    launch_rank(op, stream);
}

template <class T>
void launch_absorbed_attention(const Operands<T>& op, bool on_tensor_cores, cudaStream_t stream) {
    if constexpr (!std::is_same_v<T, float>) {
        if (on_tensor_cores) return (op.keys.scales ? launch_mma<T, int8_t> : launch_mma<T, T>)(op, stream);
    }
    launch_fma(op, stream);
}

}  // namespace recattn
