#pragma once
#include "host/python.h"

namespace recattn::host {

// make_launch(describe, launch_by_triton, runtime_knobs, driver) -> launch(kernel, grid, *arguments, **constants)
//
// launch runs a compiled kernel that it has run before, without Triton's search for it. Its key tells apart all that
// Triton 3.5 to 3.9 compiles a kernel anew for: the device, types, constants, and what Triton specializes on. Tensors
// go to Triton's launcher as pointers, which saves it a query of the driver for each.
// It returns what launch_by_triton returned.
//
// describe(kernel) gives a byte for each argument, 0 where its value is not specialized on, and the number of
// tl.constexpr arguments; None for a kernel that only Triton can launch. launch_by_triton(kernel, grid, *arguments,
// **constants) serves all that launch does not: it returns what to call for the same key from then on, CompiledKernel's
// (run, function, packed_metadata), or None.
PyObject* make_launch(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// set_recorder(launch, recorder): from now on recorder(kernel, grid, *arguments, **constants) takes the place of this
// thread's launches; None ends it.
PyObject* set_recorder(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace recattn::host
