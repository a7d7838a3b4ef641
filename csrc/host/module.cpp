// The Python module recattn._host: what a call costs on the host, made cheap.
#include "host/launch.h"
#include "host/layouts.h"
#include "host/python.h"
#include "host/torch_objects.h"

namespace recattn::host {

TorchObjects torch_objects;

namespace {

PyObject* attributes(PyObject* module, std::initializer_list<const char*> names) {
    Reference tuple(PyTuple_New(static_cast<Py_ssize_t>(names.size())));
    Py_ssize_t i = 0;
    for (const char* name : names) {
        PyObject* attribute = tuple ? PyObject_GetAttrString(module, name) : nullptr;
        if (attribute == nullptr) {
            return nullptr;
        }
        PyTuple_SET_ITEM(tuple.get(), i++, attribute);
    }
    return tuple.release();
}

// The references are kept for as long as the process lives.
bool find_torch_objects() {
    const Reference torch(PyImport_ImportModule("torch"));
    const Reference nn(torch ? PyImport_ImportModule("torch.nn") : nullptr);
    if (!nn) {
        return false;
    }
    torch_objects = {
        .tensor_type = PyObject_GetAttrString(torch.get(), "Tensor"),
        .parameter_type = PyObject_GetAttrString(nn.get(), "Parameter"),
        .strided = PyObject_GetAttrString(torch.get(), "strided"),
        .floating = attributes(torch.get(), {"float64", "float32", "bfloat16", "float16"}),
        .integer = attributes(torch.get(), {"int64", "int32"}),
        .boolean = PyObject_GetAttrString(torch.get(), "bool"),
        .data_ptr = PyUnicode_InternFromString("data_ptr"),
        .device = PyUnicode_InternFromString("device"),
        .dtype = PyUnicode_InternFromString("dtype"),
        .is_meta = PyUnicode_InternFromString("is_meta"),
        .layout = PyUnicode_InternFromString("layout"),
        .shape = PyUnicode_InternFromString("shape"),
    };
    return !PyErr_Occurred();
}

template <class Function>
PyCFunction as_method(Function* function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef methods[] = {
    {"sizes", as_method(sizes), METH_FASTCALL, "csrc/host/layouts.h"},
    {"all_plain", all_plain, METH_O, "csrc/host/layouts.h"},
    {"make_launch", as_method(make_launch), METH_FASTCALL, "csrc/host/launch.h"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_host", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

}  // namespace recattn::host

PyMODINIT_FUNC PyInit__host() {
    return recattn::host::find_torch_objects() ? PyModule_Create(&recattn::host::definition) : nullptr;
}
