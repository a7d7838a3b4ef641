// Plans: what a function of tensors calls and launches, recorded once and replayed for other tensors of other sizes.
#pragma once
#include "host/python.h"

namespace recattn::host {

// make_plan(types, num_inputs, num_slots, steps, result) -> plan(arguments) -> result
//
// The plan returns NotImplemented where it does not hold: a guard fails, or a launch would need another compiled
// kernel. What it has called by then is of no consequence. It returns ... where now the function itself must run: a
// profiler's hooks are to hear of its launches, or its tensors are not on the current device.
//
// Slots are the tensors of the arguments, in order, then the results of the calls. Steps are, each a tuple:
//   "guard", expression, relation, expression, outcome     a comparison that the function made: = or <; or, of an
//                                                          integer in a launch, what Triton knows of it: it is 1,
//                                                          d(ivisible by 16), - neither; of all, ? that it is an int32
//   "aligned", pointer, outcome                             whether its data are aligned to 16 bytes
//   "call", function, arguments, keywords, slot            a call of PyTorch, whose results become slots from this on
//   "launch", run, function, packed_metadata, grid, arguments
// `types` are those of recattn.ops._plans that stand for what a replay finds out: Slot(index) for a tensor,
// Pointer(index) for its data in a launch, Expression(operation, a, b) made of sizes and strides, Integer(expression)
// for its value.
PyObject* make_plan(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace recattn::host
