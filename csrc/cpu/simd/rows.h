// Rows<T> (cpu/rows.h) as operands of a product, for one instruction set (see foreach_isa.h). Needs matmul.h. No
// include guard.

namespace recattn::RECATTN_ISA {

// Number of elements that hold `numbers` numbers.
template <class E>
RECATTN_INLINE int64_t elements(int64_t numbers) {
    return (numbers + Element<E>::numbers - 1) / Element<E>::numbers;
}

// Prefetches a row into the L1 cache (kLocality 3) or the L2 cache (2).
template <int kLocality, class T>
RECATTN_INLINE void prefetch_row(const T* row, int64_t columns) {
    for (int64_t n = 0; n < columns; n += 64 / sizeof(T)) __builtin_prefetch(row + n, 0, kLocality);
}

template <class T>
RECATTN_INLINE void prefetch_rows(const Rows<T>& in, int64_t begin, int64_t end, int64_t columns) {
    for (int64_t m = begin; m < end; ++m) prefetch_row<3>(in.at(m), columns);
}

// Rows begin..end as an Lhs: in place if they are contiguous and have type E, else gathered and converted.
template <class T, class E>
RECATTN_TARGET Lhs<E> as_lhs(const Rows<T>& in, int64_t begin, int64_t end, int64_t columns, E* scratch) {
    if (in.indices == nullptr) return as_lhs(in.at(begin), in.row_stride, end - begin, columns, scratch);
    const int64_t row_stride = elements<E>(columns);
    for (int64_t m = begin; m < end; ++m) copy_row(in.at(m), columns, scratch + (m - begin) * row_stride);
    return {scratch, row_stride, 1};
}

// Rows begin..end as an Rhs: in place if they also fill whole registers, else copied and padded with zeros.
template <class T, class E>
RECATTN_TARGET Rhs<E> as_rhs(const Rows<T>& in, int64_t begin, int64_t end, int64_t columns, E* scratch) {
    if (in.indices == nullptr) return as_rhs(in.at(begin), in.row_stride, end - begin, columns, scratch);
    const int64_t row_stride = round_up_to_lanes<E>(columns);
    for (int64_t m = begin; m < end; ++m) {
        E* out = scratch + (m - begin) * row_stride;
        copy_row(in.at(m), columns, out);
        std::fill(out + columns, out + row_stride, E(0));
    }
    return {scratch, row_stride};
}

// out[m, n] = sum_k lhs[m, k] rhs[k, n] with any number of columns, rounded to T: through `scratch`, unless rows of
// `out` are whole registers of sums. rhs has whole registers.
template <class T, class E>
RECATTN_TARGET void multiply_to(Lhs<E> lhs, Rhs<E> rhs, T* out, int64_t out_row_stride, int64_t rows, int64_t depth,
                                int64_t columns, sum_t<E>* scratch) {
    const int64_t padded = round_up_to_lanes<E>(columns);
    if constexpr (std::is_same_v<T, sum_t<E>>) {
        if (padded == columns) return multiply_in_blocks(lhs, rhs, {out, out_row_stride, false}, rows, depth, columns);
    }
    multiply_in_blocks(lhs, rhs, {scratch, padded, false}, rows, depth, padded);
    for (int64_t m = 0; m < rows; ++m) copy_row(scratch + m * padded, columns, out + m * out_row_stride);
}

}  // namespace recattn::RECATTN_ISA
