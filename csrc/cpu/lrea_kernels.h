// The LREA kernels for one instruction set (see foreach_isa.h). Matrices are row-major; a "row stride" counts elements.

#define RECATTN_INLINE RECATTN_TARGET __attribute__((always_inline)) inline

namespace recattn::RECATTN_ISA {

template <class A>
struct Vector {
    typedef A type __attribute__((vector_size(RECATTN_VECTOR_BYTES), aligned(alignof(A)), may_alias));
    static constexpr int64_t lanes = RECATTN_VECTOR_BYTES / sizeof(A);
};

template <class A>
RECATTN_INLINE int64_t round_up_to_lanes(int64_t size) {
    return (size + Vector<A>::lanes - 1) / Vector<A>::lanes * Vector<A>::lanes;
}

// a[m, k] = data[m * row + k * column]: read by scalars, so any layout will do.
template <class A>
struct Left {
    const A* data;
    int64_t row, column;
};

template <class A>
struct Right {
    const A* data;
    int64_t row;
};

template <class A>
struct Product {
    A* data;
    int64_t row;
    bool accumulate;
};

// out[m, n] (+)= sum_k a[m, k] b[k, n] for M rows and V registers of columns.
template <int M, int V, class A>
RECATTN_INLINE void multiply_tile(Left<A> a, Right<A> b, Product<A> out, int64_t depth) {
    using Vec = typename Vector<A>::type;
    constexpr int64_t lanes = Vector<A>::lanes;
    Vec acc[M][V];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            acc[m][v] = out.accumulate ? *reinterpret_cast<const Vec*>(out.data + m * out.row + v * lanes) : Vec{};
        }
    }
    for (int64_t k = 0; k < depth; ++k) {
        Vec row[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) row[v] = *reinterpret_cast<const Vec*>(b.data + k * b.row + v * lanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const A scalar = a.data[m * a.row + k * a.column];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) acc[m][v] += scalar * row[v];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) *reinterpret_cast<Vec*>(out.data + m * out.row + v * lanes) = acc[m][v];
    }
}

// The same for any number of columns, a multiple of the lanes.
template <int M, int V, class A>
RECATTN_INLINE void multiply_columns(Left<A> a, Right<A> b, Product<A> out, int64_t depth, int64_t columns) {
    constexpr int64_t step = V * Vector<A>::lanes;
    for (; columns >= step; columns -= step, b.data += step, out.data += step) multiply_tile<M, V>(a, b, out, depth);
    if constexpr (V > 1) multiply_columns<M, V / 2>(a, b, out, depth, columns);
}

// The same for any number of rows too.
template <int M, class A>
RECATTN_TARGET void multiply(Left<A> a, Right<A> b, Product<A> out, int64_t rows, int64_t depth, int64_t columns) {
    for (; rows >= M; rows -= M, a.data += M * a.row, out.data += M * out.row) {
        multiply_columns<M, RECATTN_TILE_VECTORS>(a, b, out, depth, columns);
    }
    if constexpr (M > 1) multiply<M / 2>(a, b, out, rows, depth, columns);
}

// out[n, m] = in[m, n] for a block of 4 x 4, by two rounds of pairwise interleaving.
template <class A>
RECATTN_INLINE void transpose_block(const A* in, int64_t in_row, A* out, int64_t out_row) {
    typedef A Quad __attribute__((vector_size(4 * sizeof(A)), aligned(alignof(A)), may_alias));
    const Quad a = *reinterpret_cast<const Quad*>(in), b = *reinterpret_cast<const Quad*>(in + in_row);
    const Quad c = *reinterpret_cast<const Quad*>(in + 2 * in_row), d = *reinterpret_cast<const Quad*>(in + 3 * in_row);
    const Quad ab_low = {a[0], b[0], a[1], b[1]}, ab_high = {a[2], b[2], a[3], b[3]};
    const Quad cd_low = {c[0], d[0], c[1], d[1]}, cd_high = {c[2], d[2], c[3], d[3]};
    *reinterpret_cast<Quad*>(out) = Quad{ab_low[0], ab_low[1], cd_low[0], cd_low[1]};
    *reinterpret_cast<Quad*>(out + out_row) = Quad{ab_low[2], ab_low[3], cd_low[2], cd_low[3]};
    *reinterpret_cast<Quad*>(out + 2 * out_row) = Quad{ab_high[0], ab_high[1], cd_high[0], cd_high[1]};
    *reinterpret_cast<Quad*>(out + 3 * out_row) = Quad{ab_high[2], ab_high[3], cd_high[2], cd_high[3]};
}

// out[n, m] = in[m, n]
template <class A>
RECATTN_TARGET void transpose(Left<A> in, int64_t rows, int64_t columns, A* out, int64_t out_row) {
    const int64_t block_rows = rows / 4 * 4, block_columns = columns / 4 * 4;
    for (int64_t n = 0; n < block_columns; n += 4) {
        for (int64_t m = 0; m < block_rows; m += 4) {
            transpose_block(in.data + m * in.row + n, in.row, out + n * out_row + m, out_row);
        }
    }
    for (int64_t m = 0; m < rows; ++m) {
        for (int64_t n = m < block_rows ? block_columns : 0; n < columns; ++n)
            out[n * out_row + m] = in.data[m * in.row + n];
    }
}

// Asks for `rows` rows ahead of their use (kWrite 0) or of their being written (1).
template <int kWrite, class T>
RECATTN_INLINE void prefetch_rows(const T* data, int64_t row, int64_t rows, int64_t columns) {
    for (int64_t m = 0; m < rows; ++m) {
        for (int64_t n = 0; n < columns; n += 64 / sizeof(T)) __builtin_prefetch(data + m * row + n, kWrite);
    }
}

template <class To, class From>
RECATTN_INLINE void copy_row(const From* in, int64_t size, To* out) {
    for (int64_t i = 0; i < size; ++i) out[i] = static_cast<To>(in[i]);
}

// `rows` rows to read by scalars: where they lie if the type is the accumulator's, else converted.
template <class T, class A>
RECATTN_TARGET Left<A> as_left(const T* in, int64_t in_row, int64_t rows, int64_t columns, A* scratch) {
    if constexpr (std::is_same_v<T, A>) {
        return {in, in_row, 1};
    } else {
        for (int64_t m = 0; m < rows; ++m) copy_row(in + m * in_row, columns, scratch + m * columns);
        return {scratch, columns, 1};
    }
}

// `rows` rows that registers may read whole: where they lie if that is so, else copied and padded with zeros.
template <class T, class A>
RECATTN_TARGET Right<A> as_right(const T* in, int64_t in_row, int64_t rows, int64_t columns, A* scratch) {
    const int64_t padded = round_up_to_lanes<A>(columns);
    if constexpr (std::is_same_v<T, A>) {
        if (columns == padded) return {in, in_row};
    }
    for (int64_t m = 0; m < rows; ++m) {
        copy_row(in + m * in_row, columns, scratch + m * padded);
        std::fill(scratch + m * padded + columns, scratch + (m + 1) * padded, A(0));
    }
    return {scratch, padded};
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

#undef RECATTN_INLINE
