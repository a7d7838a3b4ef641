// leaky_relu in whole registers, for one instruction set (see foreach_isa.h). No include guard.

namespace recattn::RECATTN_ISA {

// Written for registers because a compiler keeps a branch in a loop over numbers: x * slope may trap.
template <class Vec, class A>
RECATTN_INLINE Vec leaky_relu(Vec x, A slope) {
    return x > A(0) ? x : x * slope;
}

}  // namespace recattn::RECATTN_ISA
