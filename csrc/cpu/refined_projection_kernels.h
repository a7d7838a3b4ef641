// x = A [W_q | W_k] with A = mask(scale * q k^T), and its gradients, in float32, for one instruction set (see
// foreach_isa.h). A is linear in k, so what a block of positions takes from those before it passes through a state:
//
//   x_b = q_b S + mask(q_b k_b^T) W_b                 S  = sum of k_j^T W_j over the blocks j before b
//   dA = mask(dx W^T)
//   dq_b = dx_b S^T + dA_b k_b
//   dk_b = W_b dS^T + dA_b^T q_b                      dS = sum of q_i^T dx_i over the blocks i after b
//   dW_b = k_b dS + A_b^T dx_b
//
// k comes already multiplied by scale. Not causal, S and dS are sums over all blocks, and nothing else is needed. One
// task is a group of (batch, head) indices; its buffers stay in the core's cache.

#include "cpu/simd/matmul.h"
#include "cpu/simd/matmul_triangular.h"

namespace recattn::RECATTN_ISA {
namespace {

// Positions of a block: whole register tiles. A larger block computes more of A, a smaller one reads S more often.
constexpr int64_t kProjectionBlock = 48;

// Row stride of buffers: an odd number of cache lines, so that the rows of a column lie in different sets of the cache.
RECATTN_INLINE int64_t buffer_row_stride(int64_t columns) { return (columns + 15) / 16 / 2 * 32 + 16; }

struct Buffer {
    float* data = nullptr;
    int64_t row_stride = 0;

    RECATTN_TARGET operator Lhs<float>() const { return {data, row_stride, 1}; }
    RECATTN_TARGET operator Rhs<float>() const { return {data, row_stride}; }
    RECATTN_TARGET Lhs<float> transposed() const { return {data, 1, row_stride}; }
    RECATTN_TARGET Out<float> out(bool accumulate) const { return {data, row_stride, accumulate}; }
};

// One (batch, head): its n tokens begin at `start` of the N or T axis, the first at position `first_position` of W.
template <class T>
class Projection {
  public:
    RECATTN_TARGET explicit Projection(const RefinedProjection<T>& op) : op_(op), memory_(allocate(nullptr)) {
        allocate(memory_.data());
    }

    RECATTN_TARGET void forward(int64_t index) {
        locate(index);
        clear(state_, op_.dim);
        if (!op_.causal) {
            for (int64_t first = 0; first < n_; first += kProjectionBlock) add_to_state(first);
        }
        for (int64_t first = 0; first < n_; first += kProjectionBlock) {
            const int64_t rows = std::min(kProjectionBlock, n_ - first);
            load(op_.q, first, rows, op_.dim, 1, q_);
            if (op_.causal) {
                load(op_.k, first, rows, op_.dim, op_.scale, k_);
                compute_a(rows);
                multiply_triangular(a_, w(first), x_.out(false), {rows, rows, op_.width}, {.lhs = Triangle::lower});
            }
            if (!op_.causal || first > 0) {
                product(q_, state_, x_.out(op_.causal), rows, op_.dim, op_.width);
            }
            if (op_.causal && first + rows < n_) {
                product(k_.transposed(), w(first), state_.out(true), op_.dim, rows, op_.width);
            }
            for (int64_t i = 0; i < rows; ++i) {
                const float* x = x_.data + i * x_.row_stride;
                copy_row(x, op_.rank, op_.queries.at(batch_, head_, start_ + first + i));
                copy_row(x + op_.width / 2, op_.rank, op_.keys.at(batch_, head_, start_ + first + i));
            }
        }
    }

    // Adds dW to `dw`, laid out as op.w.
    RECATTN_TARGET void backward(int64_t index, float* dw) {
        locate(index);
        clear(state_t_, op_.width);
        clear(state_, op_.dim);
        if (!op_.causal) {
            for (int64_t first = 0; first < n_; first += kProjectionBlock) add_to_state_t(first);
        }
        for (int64_t first = 0; first < n_; first += kProjectionBlock) backward_queries(first);
        if (!op_.causal) {
            for (int64_t first = 0; first < n_; first += kProjectionBlock) add_to_dstate(first);
        }
        const int64_t blocks = (n_ + kProjectionBlock - 1) / kProjectionBlock;
        for (int64_t block = blocks - 1; block >= 0; --block) {
            backward_keys(block * kProjectionBlock, block + 1 < blocks, dw + w_offset());
        }
        write_padding(op_.dq);
        write_padding(op_.dk);
    }

  private:
    // Hands out the buffers; returns their size in all.
    RECATTN_TARGET int64_t allocate(float* memory) {
        int64_t used = 0;
        const auto take = [&](Buffer& buffer, int64_t rows, int64_t columns) RECATTN_TARGET {
            buffer = {memory == nullptr ? nullptr : memory + used, buffer_row_stride(columns)};
            used += rows * buffer.row_stride;
        };
        take(q_, kProjectionBlock, op_.dim);
        take(k_, kProjectionBlock, op_.dim);
        take(k_t_, op_.dim, kProjectionBlock);
        take(a_, kProjectionBlock, kProjectionBlock);
        take(x_, kProjectionBlock, op_.width);
        take(state_, op_.dim, op_.width);
        if (op_.backward) {
            take(state_t_, op_.width, op_.dim);
            take(w_t_, op_.width, kProjectionBlock);
            take(da_, kProjectionBlock, kProjectionBlock);
            take(out_, kProjectionBlock, op_.dim);
        }
        return used;
    }

    RECATTN_TARGET void locate(int64_t index) {
        batch_ = index / op_.heads;
        head_ = index % op_.heads;
        n_ = op_.spans[batch_].length;
        start_ = op_.spans[batch_].start;
        first_position_ = op_.spans[batch_].first_position;
    }

    RECATTN_TARGET int64_t w_offset() const {
        return ((op_.per_head ? head_ * op_.positions : 0) + first_position_) * op_.w_row_stride;
    }
    RECATTN_TARGET Buffer w(int64_t first) const {
        return {const_cast<float*>(op_.w) + w_offset() + first * op_.w_row_stride, op_.w_row_stride};
    }

    RECATTN_TARGET static void clear(Buffer buffer, int64_t rows) {
        std::fill_n(buffer.data, rows * buffer.row_stride, 0.0f);
    }

    // scale * tokens, zeros up to the row stride.
    template <class Source>
    RECATTN_TARGET void load(const Tokens<const Source>& tensor, int64_t first, int64_t rows, int64_t columns,
                             float scale, Buffer buffer, int64_t first_column = 0) const {
        for (int64_t i = 0; i < rows; ++i) {
            const Source* in = tensor.at(batch_, head_, start_ + first + i);
            float* out = buffer.data + i * buffer.row_stride + first_column;
            for (int64_t j = 0; j < columns; ++j) out[j] = scale * static_cast<float>(in[j]);
            std::fill(out + columns, buffer.data + (i + 1) * buffer.row_stride, 0.0f);
        }
    }

    RECATTN_TARGET void load_dx(int64_t first, int64_t rows) const {
        load(op_.dqueries, first, rows, op_.rank, 1, x_);
        load(op_.dkeys, first, rows, op_.rank, 1, x_, op_.width / 2);
    }

    RECATTN_TARGET static void product(Lhs<float> lhs, Rhs<float> rhs, Out<float> out, int64_t rows, int64_t depth,
                                       int64_t columns) {
        multiply_in_blocks(lhs, rhs, out, rows, depth, round_up_to_lanes<float>(columns));
    }

    // Zero above the diagonal.
    RECATTN_TARGET static void mask(Buffer a, int64_t rows) {
        for (int64_t i = 0; i < rows; ++i) {
            std::fill(a.data + i * a.row_stride + i + 1, a.data + i * a.row_stride + round_up_to_lanes<float>(rows), 0);
        }
    }

    // A of the block whose q and k are loaded.
    RECATTN_TARGET void compute_a(int64_t rows) const {
        transpose<float>(k_, rows, op_.dim, k_t_.data, k_t_.row_stride);
        multiply_triangular(q_, k_t_, a_.out(false), {rows, op_.dim, rows}, {.out = Triangle::lower});
        mask(a_, rows);
    }

    // dA of the block whose dx is loaded.
    RECATTN_TARGET void compute_da(int64_t first, int64_t rows) const {
        transpose<float>(w(first), rows, op_.width, w_t_.data, w_t_.row_stride);
        multiply_triangular(x_, w_t_, da_.out(false), {rows, op_.width, rows}, {.out = Triangle::lower});
        mask(da_, rows);
    }

    RECATTN_TARGET void add_to_state(int64_t first) const {
        const int64_t rows = std::min(kProjectionBlock, n_ - first);
        load(op_.k, first, rows, op_.dim, op_.scale, k_);
        product(k_.transposed(), w(first), state_.out(true), op_.dim, rows, op_.width);
    }

    RECATTN_TARGET void add_to_state_t(int64_t first) const {
        const int64_t rows = std::min(kProjectionBlock, n_ - first);
        load(op_.k, first, rows, op_.dim, op_.scale, k_);
        product(w(first).transposed(), k_, state_t_.out(true), op_.width, rows, op_.dim);
    }

    RECATTN_TARGET void add_to_dstate(int64_t first) const {
        const int64_t rows = std::min(kProjectionBlock, n_ - first);
        load(op_.q, first, rows, op_.dim, 1, q_);
        load_dx(first, rows);
        product(q_.transposed(), x_, state_.out(true), op_.dim, rows, op_.width);
    }

    // dq of a block. Causal, state_t holds S^T of the blocks before, and then also this one.
    RECATTN_TARGET void backward_queries(int64_t first) const {
        const int64_t rows = std::min(kProjectionBlock, n_ - first);
        load_dx(first, rows);
        if (op_.causal) {
            load(op_.k, first, rows, op_.dim, op_.scale, k_);
            compute_da(first, rows);
            multiply_triangular(da_, k_, out_.out(false), {rows, rows, op_.dim}, {.lhs = Triangle::lower});
        }
        if (!op_.causal || first > 0) product(x_, state_t_, out_.out(op_.causal), rows, op_.width, op_.dim);
        if (op_.causal && first + rows < n_) {
            product(w(first).transposed(), k_, state_t_.out(true), op_.width, rows, op_.dim);
        }
        store(op_.dq, first, rows, 1);
    }

    // dk and dW of a block. Causal, state holds dS of the blocks after (has_later: there are any), and then also this.
    RECATTN_TARGET void backward_keys(int64_t first, bool has_later, float* dw) const {
        const int64_t rows = std::min(kProjectionBlock, n_ - first);
        const Out<float> dw_block{dw + first * op_.w_row_stride, op_.w_row_stride, true};
        load(op_.k, first, rows, op_.dim, op_.scale, k_);
        if (op_.causal) {
            load(op_.q, first, rows, op_.dim, 1, q_);
            load_dx(first, rows);
            compute_a(rows);
            multiply_triangular(a_.transposed(), x_, dw_block, {rows, rows, op_.width}, {.lhs = Triangle::upper});
            compute_da(first, rows);
            multiply_triangular(da_.transposed(), q_, out_.out(false), {rows, rows, op_.dim}, {.lhs = Triangle::upper});
        }
        if (!op_.causal || has_later) {
            if (op_.causal || !has_later)
                transpose<float>(state_, op_.dim, op_.width, state_t_.data, state_t_.row_stride);
            product(k_, state_, dw_block, rows, op_.dim, op_.width);
            product(w(first), state_t_, out_.out(op_.causal), rows, op_.width, op_.dim);
        }
        if (op_.causal && first > 0) {
            product(q_.transposed(), x_, state_.out(true), op_.dim, rows, op_.width);
        }
        store(op_.dk, first, rows, op_.scale);
    }

    RECATTN_TARGET void store(const Tokens<T>& tensor, int64_t first, int64_t rows, float scale) const {
        for (int64_t i = 0; i < rows; ++i) {
            const float* in = out_.data + i * out_.row_stride;
            T* out = tensor.at(batch_, head_, start_ + first + i);
            for (int64_t j = 0; j < op_.dim; ++j) out[j] = static_cast<T>(scale * in[j]);
        }
    }

    RECATTN_TARGET void write_padding(const Tokens<T>& tensor) const {
        for (int64_t i = 0; i < op_.padded_length; ++i) {
            if (i < start_ || i >= start_ + n_) std::fill_n(tensor.at(batch_, head_, i), op_.dim, T(0));
        }
    }

    const RefinedProjection<T>& op_;
    // x_ is dx in the backward, state_ there dS, and state_t_ S^T and then dS^T.
    Buffer q_, k_, k_t_, a_, x_, state_, state_t_, w_t_, da_, out_;
    Scratch<float> memory_;
    int64_t batch_ = 0, head_ = 0, n_ = 0, start_ = 0, first_position_ = 0;
};

// --- Tasks ---

// x of the (batch, head) indices begin..end.
template <class T>
RECATTN_TARGET void projection_forward(const RefinedProjection<T>& op, int64_t begin, int64_t end) {
    Projection<T> projection(op);
    for (int64_t index = begin; index < end; ++index) projection.forward(index);
}

// Groups begin..end. Each group sums dW in its own part of `dw`, so that the bits do not depend on the threads.
template <class T>
RECATTN_TARGET void projection_backward(const RefinedProjection<T>& op, const Groups& groups, int64_t begin,
                                        int64_t end, float* dw) {
    Projection<T> projection(op);
    for (int64_t group = begin; group < end; ++group) {
        float* partial = dw + group * op.w_size;
        std::fill_n(partial, op.w_size, 0.0f);
        for (int64_t index = groups.start(group); index < groups.start(group + 1); ++index) {
            projection.backward(index, partial);
        }
    }
}

}  // namespace
}  // namespace recattn::RECATTN_ISA
