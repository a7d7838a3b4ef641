// The Python module recattn._host: what a call costs on the host, made cheap.
#include "host/autograd.h"
#include "host/launch.h"
#include "host/layouts.h"
#include "host/plan.h"
#include "host/python.h"
#include "host/signature.h"
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
    const Reference core(nn ? PyImport_ImportModule("torch._C") : nullptr);
    const Reference core_autograd(core ? PyImport_ImportModule("torch._C._autograd") : nullptr);
    if (!core_autograd) {
        return false;
    }
    torch_objects = {
        .tensor_type = PyObject_GetAttrString(torch.get(), "Tensor"),
        .parameter_type = PyObject_GetAttrString(nn.get(), "Parameter"),
        .strided = PyObject_GetAttrString(torch.get(), "strided"),
        .floating = attributes(torch.get(), {"float64", "float32", "bfloat16", "float16"}),
        .integer = attributes(torch.get(), {"int64", "int32"}),
        .boolean = PyObject_GetAttrString(torch.get(), "bool"),
        .num_dispatch_modes = PyObject_GetAttrString(core.get(), "_len_torch_dispatch_stack"),
        .is_profiled = PyObject_GetAttrString(core_autograd.get(), "_profiler_enabled"),
        .tracing_state = PyObject_GetAttrString(core.get(), "_get_tracing_state"),
        .is_grad_enabled = PyObject_GetAttrString(torch.get(), "is_grad_enabled"),
        .is_any_autocast_enabled = PyObject_GetAttrString(core.get(), "_is_any_autocast_enabled"),
        .forward_ad = PyImport_ImportModule("torch.autograd.forward_ad"),
        .current_level = PyUnicode_InternFromString("_current_level"),
        .data_ptr = PyUnicode_InternFromString("data_ptr"),
        .device = PyUnicode_InternFromString("device"),
        .dim = PyUnicode_InternFromString("dim"),
        .dtype = PyUnicode_InternFromString("dtype"),
        .get_device = PyUnicode_InternFromString("get_device"),
        .is_meta = PyUnicode_InternFromString("is_meta"),
        .layout = PyUnicode_InternFromString("layout"),
        .requires_grad = PyUnicode_InternFromString("requires_grad"),
        .shape = PyUnicode_InternFromString("shape"),
        .stride = PyUnicode_InternFromString("stride"),
    };
    return !PyErr_Occurred();
}

template <class Function>
PyCFunction as_method(Function* function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef methods[] = {
    {"sizes", as_method(sizes), METH_FASTCALL, "csrc/host/layouts.h"},
    {"is_traced", is_traced, METH_O, "csrc/host/autograd.h"},
    {"needs_autograd", needs_autograd, METH_O, "csrc/host/autograd.h"},
    {"is_direct", is_direct, METH_O, "csrc/host/autograd.h"},
    {"make_launch", as_method(make_launch), METH_FASTCALL, "csrc/host/launch.h"},
    {"set_recorder", as_method(set_recorder), METH_FASTCALL, "csrc/host/launch.h"},
    {"signature", signature, METH_O, "csrc/host/signature.h"},
    {"make_plan", as_method(make_plan), METH_FASTCALL, "csrc/host/plan.h"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_host", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

}  // namespace recattn::host

PyMODINIT_FUNC PyInit__host() {
    return recattn::host::find_torch_objects() ? PyModule_Create(&recattn::host::definition) : nullptr;
}
