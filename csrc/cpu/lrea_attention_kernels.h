// lrea_absorbed_attention for one instruction set (see foreach_isa.h).
//
//   lrea_absorbed_attention   h[t] = leaky_relu(q[t] keys^T) values      keys [r, d], values [r, dv] of t's user
//
// One task is a range of candidates: for each user and head, keys are transposed once, then up to 12 candidates at a
// time are multiplied. Register tiles: RECATTN_TILE_ROWS rows by RECATTN_TILE_VECTORS registers. An element E is a
// number, or two 16-bit numbers (matmul_16bit.h).

#include "cpu/simd/leaky_relu.h"
#include "cpu/simd/matmul.h"
#if RECATTN_HAS_BF16
#include "cpu/simd/matmul_16bit.h"
#endif
#include "cpu/simd/rows.h"

namespace recattn::RECATTN_ISA {
namespace {

template <class S>
RECATTN_INLINE void prefetch_state(const StateTable<S>& table, int64_t slot, int64_t head, int64_t begin, int64_t end,
                                   int64_t columns) {
    const S* rows = table.at(slot, head);
    for (int64_t k = begin; k < end; ++k) prefetch_row<2>(rows + k * table.row_stride, columns);
}

// Whether operands are rounded to integers, each row with its own step (lrea_int16_kernels.h).
template <class E>
inline constexpr bool rounds_to_int = std::is_integral_v<sum_t<E>>;
template <class E>
using scale_t = std::conditional_t<rounds_to_int<E>, float, sum_t<E>>;

template <class E>
struct AttendScratch {
    using A = sum_t<E>;
    static constexpr int64_t max_block = 12;  // their scores stay in the L1 cache
    int64_t block;                            // candidates computed together
    Scratch<E> keys, values, rows;
    Scratch<A> scores, output;
    Scratch<scale_t<E>> key_scales, value_scales;
    Scratch<float> target, steps;  // only used if rounds_to_int

    RECATTN_TARGET AttendScratch(int64_t candidates, int64_t rank, int64_t query_dim, int64_t value_dim)
        : block(std::min(max_block, candidates)),
          keys(elements<E>(query_dim) * round_up_to_lanes<E>(rank)),
          values(elements<E>(rank) * round_up_to_lanes<E>(value_dim)),
          rows(std::max(block, rank) * elements<E>(query_dim)),
          scores(block * round_up_to_lanes<A>(rank)),
          output(block * round_up_to_lanes<A>(value_dim)),
          key_scales(round_up_to_lanes<A>(rank)),
          value_scales(round_up_to_lanes<A>(rank)),
          target(rounds_to_int<E> ? query_dim : 0),
          steps(rounds_to_int<E> ? block : 0) {}
};

// --- Steps around the two products of a block of candidates; lrea_int16_kernels.h overloads them ---

template <class T, class E>
RECATTN_INLINE Lhs<E> load_targets(AttendScratch<E>& scratch, const Rows<T>& targets, int64_t begin, int64_t end,
                                   int64_t columns) {
    return as_lhs(targets, begin, end, columns, scratch.rows.data());
}

// scores = leaky_relu(scores), in place. For quantised states leaky_relu(scores * key_scales) * value_scales.
template <bool kQuantized, class A>
RECATTN_INLINE void activate_row(A* scores, int64_t rank, A slope, const A* key_scales, const A* value_scales) {
    using Vec = typename Vector<A>::type;
    for (int64_t k = 0; k < rank; k += Vector<A>::lanes) {
        Vec* score = reinterpret_cast<Vec*>(scores + k);
        const Vec x = kQuantized ? *score * *reinterpret_cast<const Vec*>(key_scales + k) : *score;
        const Vec weight = leaky_relu(x, slope);
        *score = kQuantized ? weight * *reinterpret_cast<const Vec*>(value_scales + k) : weight;
    }
}

// The Lhs of the second product, stored over the scores.
template <bool kQuantized, class E>
RECATTN_TARGET Lhs<E> activate(AttendScratch<E>& scratch, int64_t rows, int64_t rank, double slope) {
    using A = sum_t<E>;
    E* weights = reinterpret_cast<E*>(scratch.scores.data());
    for (int64_t m = 0; m < rows; ++m) {
        A* row = scratch.scores.data() + m * rank;
        activate_row<kQuantized>(row, rank, static_cast<A>(slope), scratch.key_scales.data(),
                                 scratch.value_scales.data());
        if constexpr (!std::is_same_v<E, A>) copy_row(row, rank, weights + m * rank);
    }
    return {weights, rank, 1};
}

template <class T, class E>
RECATTN_TARGET void store_output(AttendScratch<E>& scratch, int64_t rows, int64_t columns, T* out, int64_t out_row) {
    const int64_t width = round_up_to_lanes<E>(columns);
    for (int64_t m = 0; m < rows; ++m) copy_row(scratch.output.data() + m * width, columns, out + m * out_row);
}

// h = leaky_relu(q keys^T) values for candidates begin..end of one user and one head. Meanwhile prefetches this head of
// the next user's state, because its address in the table is not one that the hardware could predict.
template <class T, class S, class E>
RECATTN_TARGET void attend_head(const AbsorbedAttention<T, S>& op, AttendScratch<E>& scratch, int64_t slot,
                                int64_t next_slot, int64_t head, int64_t begin, int64_t end) {
    constexpr bool quantized = std::is_same_v<S, int8_t>;
    const int64_t first = begin, count = end - begin;
    const int64_t rank = round_up_to_lanes<E>(op.rank), width = round_up_to_lanes<E>(op.value_dim);
    const int64_t depth = elements<E>(op.query_dim), out_row = op.heads * op.value_dim;
    const Rows<T> targets = op.targets_of(head);
    transpose(as_lhs(op.keys.at(slot, head), op.keys.row_stride, op.rank, op.query_dim, scratch.rows.data()), op.rank,
              depth, scratch.keys.data(), rank);
    const Rhs<E> keys{scratch.keys.data(), rank};
    const Rhs<E> values =
        as_rhs(op.values.at(slot, head), op.values.row_stride, op.rank, op.value_dim, scratch.values.data());
    if constexpr (quantized) {
        copy_row(op.keys.scales_at(slot, head), op.rank, scratch.key_scales.data());
        copy_row(op.values.scales_at(slot, head), op.rank, scratch.value_scales.data());
    }
    for (int64_t next; begin < end; begin = next) {
        next = std::min(begin + scratch.block, end);
        const int64_t rows = next - begin;
        T* out = op.out + begin * out_row + head * op.value_dim;
        prefetch_rows(targets, next, std::min(next + scratch.block, op.candidates), op.query_dim);
        const int64_t prefetched = op.rank * (begin - first) / count, prefetch_end = op.rank * (next - first) / count;
        prefetch_state(op.keys, next_slot, head, prefetched, prefetch_end, op.query_dim);
        prefetch_state(op.values, next_slot, head, prefetched, prefetch_end, op.value_dim);
        const Lhs<E> q = load_targets(scratch, targets, begin, next, op.query_dim);
        multiply_in_blocks(q, keys, {scratch.scores.data(), rank, false}, rows, depth, rank);
        const Lhs<E> weights = activate<quantized>(scratch, rows, rank, op.negative_slope);
        if constexpr (std::is_same_v<T, E>) {
            if (width == op.value_dim) {  // written straight to `out`: rows are whole registers
                multiply_in_blocks(weights, values, {out, out_row, false}, rows, elements<E>(op.rank), width);
                continue;
            }
        }
        multiply_in_blocks(weights, values, {scratch.output.data(), width, false}, rows, elements<E>(op.rank), width);
        store_output(scratch, rows, op.value_dim, out, out_row);
    }
}

// Candidates begin..end of the batch, of any users, multiplied as elements E.
template <class T, class S, class E>
RECATTN_TARGET void attend(const AbsorbedAttention<T, S>& op, int64_t begin, int64_t end) {
    AttendScratch<E> scratch(end - begin, op.rank, op.query_dim, op.value_dim);
    int64_t user = std::upper_bound(op.offsets, op.offsets + op.users, begin) - op.offsets - 1;
    while (begin < end) {
        const int64_t stop = std::min(end, op.offsets[user + 1]), slot = op.slot_of(user),
                      next_slot = std::max<int64_t>(0, op.slot_of(std::min(user + 1, op.users - 1)));
        if (slot < 0) op.store_zeros(begin, stop);
        for (int64_t head = 0; slot >= 0 && begin < stop && head < op.heads; ++head) {
            attend_head(op, scratch, slot, next_slot, head, begin, stop);
        }
        begin = stop;
        ++user;
    }
}

}  // namespace
}  // namespace recattn::RECATTN_ISA

#if RECATTN_HAS_BF16
#include "cpu/lrea_int16_kernels.h"
#endif
