#pragma once
#include "host/python.h"

namespace recattn::host {

// signature(arguments) -> bytes: of tensors dtype and number of axes, of the first its device; of other arguments, the
// fields of tuples too, the value.
PyObject* signature(PyObject*, PyObject* arguments);

}  // namespace recattn::host
