#pragma once
#include "host/python.h"

namespace recattn::host {

// is_traced(arguments) -> bool: something would see an operator that is called with them: a dispatch mode, a profiler,
// torch.jit.trace, or a tensor among them that is of a subclass or on the meta device. (torch.compile is not asked.)
PyObject* is_traced(PyObject*, PyObject* arguments);

// needs_autograd(arguments) -> bool: an autograd.Function must be applied: grad mode is on and a tensor among them
// requires a gradient, or forward mode is active. (Transforms of torch.func are not asked.)
PyObject* needs_autograd(PyObject*, PyObject* arguments);

// is_direct(arguments) -> bool: grad mode and autocast are off, and nothing is traced: a kernel may be called itself.
PyObject* is_direct(PyObject*, PyObject* arguments);

}  // namespace recattn::host
