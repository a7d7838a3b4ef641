// Scratch matrices, for one instruction set (see foreach_isa.h). Needs matmul.h. No include guard.

namespace recattn::RECATTN_ISA {

// Allocates matrices whose rows are whole registers. With memory = nullptr it only adds up the size.
class Arena {
  public:
    RECATTN_TARGET explicit Arena(float* memory) : memory_(memory) {}
    RECATTN_TARGET int64_t used() const { return used_; }

    RECATTN_TARGET float* take(int64_t rows, int64_t columns) {
        float* start = memory_ == nullptr ? nullptr : memory_ + used_;
        used_ += rows * round_up_to_lanes<float>(columns);
        return start;
    }

  private:
    float* memory_;
    int64_t used_ = 0;
};

struct Matrix {
    float* data = nullptr;
    int64_t row_stride = 0;

    Matrix() = default;
    RECATTN_TARGET Matrix(Arena& arena, int64_t rows, int64_t columns)
        : data(arena.take(rows, columns)), row_stride(round_up_to_lanes<float>(columns)) {}

    RECATTN_TARGET float* row(int64_t i) const { return data + i * row_stride; }
    RECATTN_TARGET Matrix from(int64_t i, int64_t j) const {
        Matrix part = *this;
        part.data += i * row_stride + j;
        return part;
    }

    RECATTN_TARGET operator Lhs<float>() const { return {data, row_stride, 1}; }
    RECATTN_TARGET operator Rhs<float>() const { return {data, row_stride}; }
    RECATTN_TARGET operator Out<float>() const { return {data, row_stride, false}; }
    RECATTN_TARGET Lhs<float> transposed() const { return {data, 1, row_stride}; }
    RECATTN_TARGET Out<float> accumulated() const { return {data, row_stride, true}; }
};

}  // namespace recattn::RECATTN_ISA
