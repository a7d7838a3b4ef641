// The LREA kernels for one instruction set (see foreach_isa.h).

#include "cpu/matmul.h"

namespace recattn::RECATTN_ISA {

// Asks for `rows` rows ahead of their use (kWrite 0) or of their being written (1).
template <int kWrite, class T>
RECATTN_INLINE void prefetch_rows(const T* data, int64_t row, int64_t rows, int64_t columns) {
    for (int64_t m = 0; m < rows; ++m) {
        for (int64_t n = 0; n < columns; n += 64 / sizeof(T)) __builtin_prefetch(data + m * row + n, kWrite);
    }
}

template <class A>
struct AttendScratch {
    static constexpr int64_t block = 48;  // candidates computed together: their scores stay in the nearest cache
    Scratch<A> keys, values, rows, scores, output;

    RECATTN_TARGET AttendScratch(int64_t rank, int64_t query_dim, int64_t value_dim)
        : keys(query_dim * round_up_to_lanes<A>(rank)),
          values(rank * round_up_to_lanes<A>(value_dim)),
          rows(std::max(block, rank) * query_dim),
          scores(block * round_up_to_lanes<A>(rank)),
          output(block * round_up_to_lanes<A>(value_dim)) {}
};

// h = leaky_relu(q keys^T) values for candidates begin..end, all of one user, and one head.
template <class T, class A>
RECATTN_TARGET void attend_head(const AbsorbedAttention<T>& op, AttendScratch<A>& scratch, int64_t slot, int64_t head,
                                int64_t begin, int64_t end) {
    const int64_t rank = round_up_to_lanes<A>(op.rank), width = round_up_to_lanes<A>(op.value_dim);
    const int64_t out_row = op.heads * op.value_dim;
    const T* targets = op.targets + head * op.target_head;
    T* out = op.out + head * op.value_dim;
    const A slope = static_cast<A>(op.negative_slope);
    transpose(as_left(op.keys.at(slot, head), op.keys.row, op.rank, op.query_dim, scratch.rows.data()), op.rank,
              op.query_dim, scratch.keys.data(), rank);
    const Right<A> values =
        as_right(op.values.at(slot, head), op.values.row, op.rank, op.value_dim, scratch.values.data());
    for (; begin < end; begin += scratch.block) {
        const int64_t rows = std::min(scratch.block, end - begin);
        prefetch_rows<0>(targets + (begin + rows) * op.target_row, op.target_row,
                         std::min(scratch.block, op.offsets[op.users] - begin - rows), op.query_dim);
        prefetch_rows<1>(out + begin * out_row, out_row, rows, op.value_dim);
        const Left<A> q =
            as_left(targets + begin * op.target_row, op.target_row, rows, op.query_dim, scratch.rows.data());
        A* scores = scratch.scores.data();
        multiply<RECATTN_TILE_ROWS>(q, {scratch.keys.data(), rank}, {scores, rank, false}, rows, op.query_dim, rank);
        for (int64_t i = 0; i < rows * rank; ++i) scores[i] = scores[i] > A(0) ? scores[i] : scores[i] * slope;
        multiply<RECATTN_TILE_ROWS>({scores, rank, 1}, values, {scratch.output.data(), width, false}, rows, op.rank,
                                    width);
        for (int64_t m = 0; m < rows; ++m) {
            copy_row(scratch.output.data() + m * width, op.value_dim, out + (begin + m) * out_row);
        }
    }
}

// Candidates begin..end of the batch, whichever users they belong to.
template <class T>
RECATTN_TARGET void attend(const AbsorbedAttention<T>& op, int64_t begin, int64_t end) {
    AttendScratch<accumulate_t<T>> scratch(op.rank, op.query_dim, op.value_dim);
    int64_t user = std::upper_bound(op.offsets, op.offsets + op.users, begin) - op.offsets - 1;
    while (begin < end) {
        const int64_t stop = std::min(end, op.offsets[user + 1]);
        for (int64_t head = 0; begin < stop && head < op.heads; ++head) {
            attend_head(op, scratch, op.slots[user], head, begin, stop);
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
        const int64_t length = op.starts[user + 1] - op.starts[user] - 1;
        for (int64_t first = 0; first < length; first += block) {
            const int64_t rows = std::min(block, length - first);
            const T* in = op.behaviors + user * op.behavior_user + first * op.behavior_row;
            multiply<RECATTN_TILE_ROWS, A>({op.w_comp + first * op.rank, 1, op.rank},
                                           as_right(in, op.behavior_row, rows, op.dim, behaviors.data()),
                                           {compressed.data(), width, true}, op.rank, rows, width);
        }
        for (int64_t k = 0; k < op.rank; ++k) {
            copy_row(compressed.data() + k * width, op.dim, op.out + (user * op.rank + k) * op.dim);
        }
    }
}

}  // namespace recattn::RECATTN_ISA
