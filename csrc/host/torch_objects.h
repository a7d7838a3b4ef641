// PyTorch's Python objects that this module compares with, and reads tensors by. It does not link PyTorch, so that one
// build serves every version.
#pragma once
#include "host/python.h"

namespace recattn::host {

struct TorchObjects {
    PyObject* tensor_type;
    PyObject* parameter_type;
    PyObject* strided;
    PyObject* floating;  // tuples of dtypes
    PyObject* integer;
    PyObject* boolean;

    PyObject* num_dispatch_modes;  // functions without arguments
    PyObject* is_profiled;
    PyObject* tracing_state;
    PyObject* is_grad_enabled;
    PyObject* is_any_autocast_enabled;
    PyObject* forward_ad;     // a module
    PyObject* current_level;  // its attribute's name

    PyObject* data_ptr;  // names of a tensor's attributes and methods
    PyObject* device;
    PyObject* dim;
    PyObject* dtype;
    PyObject* get_device;
    PyObject* is_meta;
    PyObject* layout;
    PyObject* requires_grad;
    PyObject* shape;
    PyObject* stride;
};

extern TorchObjects torch_objects;

// An exact Tensor or Parameter: not a subclass, which may override anything.
inline bool is_plain_tensor(PyObject* object) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == torch_objects.tensor_type || type == torch_objects.parameter_type;
}

}  // namespace recattn::host
