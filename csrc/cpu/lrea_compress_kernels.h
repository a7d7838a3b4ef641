// lrea_compress and its gradients, for one instruction set (see foreach_isa.h).
//
//   c[u] = w_comp^T behaviors[u]                   w_comp [L, r], behaviors [L, d], c [r, d]
//   dbehaviors[u] = w_comp dc[u]
//   dw_comp = sum over u of behaviors[u] dc[u]^T
//
// The behaviours of a user are the first of a row of [U, L, d], or a range of the rows of [T, d]: w_comp counts from
// its first. One task is a range of users; in the backward also a range of positions, and each task has its own sum of
// dw_comp.

#include "cpu/simd/matmul.h"
#include "cpu/simd/rows.h"

namespace recattn::RECATTN_ISA {
namespace {

// c = w_comp^T behaviors for users begin..end; each behaviour is read once.
template <class T>
RECATTN_TARGET void compress(const Compress<T>& op, int64_t begin, int64_t end) {
    using A = accumulate_t<T>;
    constexpr int64_t block = 64;  // behaviours that stay in the L1 cache while they are added to every row of c
    const int64_t width = round_up_to_lanes<A>(op.dim);
    Scratch<A> behaviors(block * width), compressed(op.rank * width);
    for (int64_t user = begin; user < end; ++user) {
        std::fill_n(compressed.data(), op.rank * width, A(0));
        const Rows<T> history = op.history(user);
        const int64_t length = op.spans[user].length;
        for (int64_t first = 0; first < length; first += block) {
            const int64_t last = std::min(first + block, length);
            if (history.indices) prefetch_rows(history, last, std::min(last + block, length), op.dim);
            multiply<RECATTN_TILE_ROWS, A>({op.w_comp + first * op.rank, 1, op.rank},
                                           as_rhs(history, first, last, op.dim, behaviors.data()),
                                           {compressed.data(), width, true}, op.rank, last - first, width);
        }
        for (int64_t k = 0; k < op.rank; ++k) {
            copy_row(compressed.data() + k * width, op.dim, op.out + (user * op.rank + k) * op.dim);
        }
    }
}

// The gradients of lrea_compress for the task's users and positions: dE_u = w_comp dC_u, and dW += E_u dC_u^T in
// dw [L, width].
template <class T>
RECATTN_TARGET void compress_backward(const CompressBackward<T>& op, const CompressTask& task, accumulate_t<T>* dw,
                                      int64_t width) {
    using A = accumulate_t<T>;
    constexpr int64_t block = kPositionBlock;
    const int64_t dim = op.dim, padded = round_up_to_lanes<A>(dim);
    Scratch<A> rows(std::max(block, op.rank) * padded), dc_rows(op.rank * padded), dc_columns(dim * width);
    if (dw != nullptr) std::fill(dw + task.first_position * width, dw + task.end_position * width, A(0));
    for (int64_t user = task.first_user; user < task.end_user; ++user) {
        const Span& span = op.spans[user];
        const T* behaviors = op.behaviors.data + user * op.behavior_user_stride + span.start * op.behaviors.row_stride;
        const T* dcompressed = op.dcompressed.data + user * op.dcompressed_user_stride;
        const int64_t last = std::min(span.length, task.end_position);
        T* dbehaviors =
            op.dbehaviors == nullptr ? nullptr : op.dbehaviors + (user * op.padded_length + span.start) * dim;
        if (dw != nullptr && task.first_position < last) {
            transpose(as_lhs(dcompressed, op.dcompressed.row_stride, op.rank, dim, rows.data()), op.rank, dim,
                      dc_columns.data(), width);
        }
        const Rhs<A> dc = as_rhs(dcompressed, op.dcompressed.row_stride, op.rank, dim, dc_rows.data());
        for (int64_t first = task.first_position; first < last; first += block) {
            const int64_t count = std::min(block, last - first);
            if (dw != nullptr) {
                const T* e = behaviors + first * op.behaviors.row_stride;
                multiply_in_blocks(as_lhs(e, op.behaviors.row_stride, count, dim, rows.data()),
                                   Rhs<A>{dc_columns.data(), width}, {dw + first * width, width, true}, count, dim,
                                   width);
            }
            if (dbehaviors != nullptr) {
                multiply_to(Lhs<A>{op.w_comp + first * op.rank, op.rank, 1}, dc, dbehaviors + first * dim, dim, count,
                            op.rank, dim, rows.data());
            }
        }
        if (dbehaviors != nullptr && op.padded_length > 0) {
            std::fill(dbehaviors + std::max(last, task.first_position) * dim, dbehaviors + task.end_position * dim,
                      T(0));
        }
    }
}

}  // namespace
}  // namespace recattn::RECATTN_ISA
