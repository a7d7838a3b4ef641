// Launches lrea_absorbed_attention: absorbed_mma.h if the caller says that half-precision operands fit it, else
// absorbed_fma.h.
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

// One block for each tile of candidates and each head; tiles and blocks are defined in absorbed_operands.h.
template <class T>
void launch(void (*kernel)(Operands<T>), Operands<T> op, int log2_tile_rows, int threads, int shared_bytes,
            cudaStream_t stream) {
    op.log2_tile_rows = log2_tile_rows;
    const int64_t tiles = (op.rows >> log2_tile_rows) + op.users;
    expect(tiles <= INT_MAX / op.heads, "targets and slots are too many for one launch: ", op.rows, " rows of ",
           op.users, " users and ", op.heads, " heads");
    constexpr int kDefaultSharedBytes = 48 << 10;
    if (shared_bytes > kDefaultSharedBytes) {
        expect_success(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    }
    void* arguments[] = {&op};
    cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(tiles * op.heads)), dim3(threads), arguments, shared_bytes,
                     stream);
    expect_success(cudaGetLastError());  // also clears the error
}

// How the last axes of targets and states may be read.
enum class Access { kNumbers, kQuads, kTensorCores };

template <class T, class State>
void launch_fma(const Operands<T>& op, bool in_quads, cudaStream_t stream) {
    const auto kernel =
        in_quads ? fma::absorbed_attention_kernel<T, State, fma::kQuad> : fma::absorbed_attention_kernel<T, State, 1>;
    launch(kernel, op, fma::kLog2TileRows, fma::kThreads, 0, stream);
}

template <class T, class State, int kRank>
void launch_mma(const Operands<T>& op, cudaStream_t stream) {
    const int shared_bytes = mma::Layout<kRank>(op.query_dim, op.value_dim).bytes();
    launch(mma::absorbed_attention_kernel<T, State, kRank>, op, mma::kLog2TileRows, mma::kThreads, shared_bytes,
           stream);
}

template <class T, class State>
void launch_mma(const Operands<T>& op, cudaStream_t stream) {
    const auto launch_rank = op.rank <= 16   ? launch_mma<T, State, 16>
                             : op.rank <= 32 ? launch_mma<T, State, 32>
                                             : launch_mma<T, State, mma::kMaxRank>;
    launch_rank(op, stream);
}

// Targets T, states State, or int8 if they have scales.
template <class T, class State = T>
void launch_absorbed_attention(const Operands<T>& op, Access access, cudaStream_t stream) {
    if constexpr (!std::is_same_v<T, float>) {
        if (access == Access::kTensorCores) {
            return (op.keys.scales ? launch_mma<T, int8_t> : launch_mma<T, T>)(op, stream);
        }
    }
    launch_fma<T, State>(op, access != Access::kNumbers, stream);
}

}  // namespace recattn
