#pragma once
#include "host/python.h"

namespace recattn::host {

// sizes(layouts, *tensors) -> tuple of the sizes of the layouts' symbols, or None where a tensor does not fit.
//
// A tensor fits if it is a plain dense tensor, or None, on the device of the first, of its layout's dtypes and shape.
// `layouts` is written by recattn._check.Layouts: the number of symbols, then for each tensor
//   a letter for its dtypes: F floating, S that of the first tensor, I int32 or int64, B bool
//   a byte of flags: 1 for a first axis that may be missing, 2 for a tensor that may be absent
//   the number of axes, and for each axis a kind and an operand:
//     s symbol       its size, which the first axis of that symbol sets
//     n number       that number
//     1 symbol       1, or the size of a symbol that is set
//     + symbol       one more than the size of a symbol
PyObject* sizes(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace recattn::host
