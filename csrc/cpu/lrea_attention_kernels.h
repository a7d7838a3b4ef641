// The LREA kernels for one instruction set (see foreach_isa.h).

#include "cpu/simd/matmul.h"
#if RECATTN_HAS_BF16
#include "cpu/simd/matmul_16bit.h"
#endif

namespace recattn::RECATTN_ISA {

// How many elements hold that many numbers.
template <class E>
RECATTN_INLINE int64_t elements(int64_t numbers) {
    return (numbers + Element<E>::numbers - 1) / Element<E>::numbers;
}

// Asks for a row ahead of its use: into the nearest cache (kLocality 3) or the next (2).
template <int kLocality, class T>
RECATTN_INLINE void prefetch_row(const T* row, int64_t columns) {
    for (int64_t n = 0; n < columns; n += 64 / sizeof(T)) __builtin_prefetch(row + n, 0, kLocality);
}

template <class T>
RECATTN_INLINE void prefetch_rows(const Rows<T>& in, int64_t begin, int64_t end, int64_t columns) {
    for (int64_t m = begin; m < end; ++m) prefetch_row<3>(in.at(m), columns);
}

template <class S>
RECATTN_INLINE void prefetch_state(const StateTable<S>& table, int64_t slot, int64_t head, int64_t begin, int64_t end,
                                   int64_t columns) {
    const S* rows = table.at(slot, head);
    for (int64_t k = begin; k < end; ++k) prefetch_row<2>(rows + k * table.row, columns);
}

// out = a b, summed in parts.
template <class E>
RECATTN_TARGET void multiply_in_parts(Left<E> a, Right<E> b, Product<sum_t<E>> out, int64_t rows, int64_t depth,
                                      int64_t columns) {
    do {
        multiply<RECATTN_TILE_ROWS>(a, b, out, rows, std::min(kSumPart, depth), columns);
        a.data += kSumPart * a.column;
        b.data += kSumPart * b.row;
        out.accumulate = true;
        depth -= kSumPart;
    } while (depth > 0);
}

// Rows begin..end to read by scalars: where they lie if they can be, else gathered and converted.
template <class T, class E>
RECATTN_TARGET Left<E> as_left(const Rows<T>& in, int64_t begin, int64_t end, int64_t columns, E* scratch) {
    if (in.indices == nullptr) return as_left(in.at(begin), in.row, end - begin, columns, scratch);
    const int64_t row = elements<E>(columns);
    for (int64_t m = begin; m < end; ++m) copy_row(in.at(m), columns, scratch + (m - begin) * row);
    return {scratch, row, 1};
}

// Rows begin..end that registers may read whole: as above.
template <class T, class E>
RECATTN_TARGET Right<E> as_right(const Rows<T>& in, int64_t begin, int64_t end, int64_t columns, E* scratch) {
    if (in.indices == nullptr) return as_right(in.at(begin), in.row, end - begin, columns, scratch);
    const int64_t row = round_up_to_lanes<E>(columns);
    for (int64_t m = begin; m < end; ++m) {
        E* out = scratch + (m - begin) * row;
        copy_row(in.at(m), columns, out);
        std::fill(out + columns, out + row, E(0));
    }
    return {scratch, row};
}

// Whether numbers are rounded to integers, each row by a step of its own.
template <class E>
inline constexpr bool rounds = std::is_integral_v<sum_t<E>>;
template <class E>
using scale_t = std::conditional_t<rounds<E>, float, sum_t<E>>;

template <class E>
struct AttendScratch {
    using A = sum_t<E>;
    static constexpr int64_t most = 24;  // their scores stay in the nearest cache
    int64_t block;                       // candidates computed together
    Scratch<E> keys, values, rows;
    Scratch<A> scores, output;
    Scratch<scale_t<E>> key_scales, value_scales;
    Scratch<float> target, steps;  // of what is rounded

    RECATTN_TARGET AttendScratch(int64_t candidates, int64_t rank, int64_t query_dim, int64_t value_dim)
        : block(std::min(most, candidates)),
          keys(elements<E>(query_dim) * round_up_to_lanes<E>(rank)),
          values(elements<E>(rank) * round_up_to_lanes<E>(value_dim)),
          rows(std::max(block, rank) * elements<E>(query_dim)),
          scores(block * round_up_to_lanes<A>(rank)),
          output(block * round_up_to_lanes<A>(value_dim)),
          key_scales(round_up_to_lanes<A>(rank)),
          value_scales(round_up_to_lanes<A>(rank)),
          target(rounds<E> ? query_dim : 0),
          steps(rounds<E> ? block : 0) {}
};

// --- What comes before, between and after the products of a block of candidates; overloaded where they round ---

template <class T, class E>
RECATTN_INLINE Left<E> load_targets(AttendScratch<E>& scratch, const Rows<T>& targets, int64_t begin, int64_t end,
                                    int64_t columns) {
    return as_left(targets, begin, end, columns, scratch.rows.data());
}

// leaky_relu of scores in place; with the scales of quantised states, of scores times key_scales, times value_scales.
template <bool kQuantized, class A>
RECATTN_INLINE void activate_row(A* scores, int64_t rank, A slope, const A* key_scales, const A* value_scales) {
    for (int64_t k = 0; k < rank; ++k) {
        const A score = kQuantized ? scores[k] * key_scales[k] : scores[k];
        const A weight = score > A(0) ? score : score * slope;
        scores[k] = kQuantized ? weight * value_scales[k] : weight;
    }
}

// The weights of the values' rows, where the scores were.
template <bool kQuantized, class E>
RECATTN_TARGET Left<E> activate(AttendScratch<E>& scratch, int64_t rows, int64_t rank, double slope) {
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

// h = leaky_relu(q keys^T) values for candidates begin..end, all of one user, and one head. Meanwhile the same head of
// the next user's state is fetched: it lies anywhere in the table, where no processor would look by itself.
template <class T, class S, class E>
RECATTN_TARGET void attend_head(const AbsorbedAttention<T, S>& op, AttendScratch<E>& scratch, int64_t slot,
                                int64_t next_slot, int64_t head, int64_t begin, int64_t end) {
    constexpr bool quantized = !std::is_same_v<S, T>;
    const int64_t first = begin, count = end - begin;
    const int64_t rank = round_up_to_lanes<E>(op.rank), width = round_up_to_lanes<E>(op.value_dim);
    const int64_t depth = elements<E>(op.query_dim), out_row = op.heads * op.value_dim;
    const Rows<T> targets = op.targets_of(head);
    transpose(as_left(op.keys.at(slot, head), op.keys.row, op.rank, op.query_dim, scratch.rows.data()), op.rank, depth,
              scratch.keys.data(), rank);
    const Right<E> keys{scratch.keys.data(), rank};
    const Right<E> values =
        as_right(op.values.at(slot, head), op.values.row, op.rank, op.value_dim, scratch.values.data());
    if constexpr (quantized) {
        copy_row(op.keys.scales_at(slot, head), op.rank, scratch.key_scales.data());
        copy_row(op.values.scales_at(slot, head), op.rank, scratch.value_scales.data());
    }
    for (int64_t next; begin < end; begin = next) {
        next = std::min(begin + scratch.block, end);
        const int64_t rows = next - begin;
        T* out = op.out + begin * out_row + head * op.value_dim;
        prefetch_rows(targets, next, std::min(next + scratch.block, op.candidates), op.query_dim);
        const int64_t fetched = op.rank * (begin - first) / count, fetch_to = op.rank * (next - first) / count;
        prefetch_state(op.keys, next_slot, head, fetched, fetch_to, op.query_dim);
        prefetch_state(op.values, next_slot, head, fetched, fetch_to, op.value_dim);
        const Left<E> q = load_targets(scratch, targets, begin, next, op.query_dim);
        multiply_in_parts(q, keys, {scratch.scores.data(), rank, false}, rows, depth, rank);
        const Left<E> weights = activate<quantized>(scratch, rows, rank, op.negative_slope);
        if constexpr (std::is_same_v<T, E>) {
            if (width == op.value_dim) {  // whole registers fit where they belong
                multiply_in_parts(weights, values, {out, out_row, false}, rows, elements<E>(op.rank), width);
                continue;
            }
        }
        multiply_in_parts(weights, values, {scratch.output.data(), width, false}, rows, elements<E>(op.rank), width);
        store_output(scratch, rows, op.value_dim, out, out_row);
    }
}

// Candidates begin..end of the batch, whichever users they belong to, by products of elements E.
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

// C = W^T E for users begin..end; each behaviour is read once.
template <class T>
RECATTN_TARGET void compress(const Compress<T>& op, int64_t begin, int64_t end) {
    using A = accumulate_t<T>;
    constexpr int64_t block = 64;  // behaviours that stay in the nearest cache while every row of C takes its share
    const int64_t width = round_up_to_lanes<A>(op.dim);
    Scratch<A> behaviors(block * width), compressed(op.rank * width);
    for (int64_t user = begin; user < end; ++user) {
        std::fill_n(compressed.data(), op.rank * width, A(0));
        const Rows<T> history = op.history(user);
        const int64_t length = op.starts[user + 1] - op.starts[user] - 1;
        for (int64_t first = 0; first < length; first += block) {
            const int64_t last = std::min(first + block, length);
            if (history.indices) prefetch_rows(history, last, std::min(last + block, length), op.dim);
            multiply<RECATTN_TILE_ROWS, A>({op.w_comp + first * op.rank, 1, op.rank},
                                           as_right(history, first, last, op.dim, behaviors.data()),
                                           {compressed.data(), width, true}, op.rank, last - first, width);
        }
        for (int64_t k = 0; k < op.rank; ++k) {
            copy_row(compressed.data() + k * width, op.dim, op.out + (user * op.rank + k) * op.dim);
        }
    }
}

}  // namespace recattn::RECATTN_ISA

#if RECATTN_HAS_BF16
#include "cpu/lrea_int16_kernels.h"
#endif
