#include "host/autograd.h"

#include "host/torch_objects.h"

namespace recattn::host {

namespace {

// The answer of a function without arguments: 1, 0, or -1 with an exception set.
int ask(PyObject* function) {
    const Reference answer(PyObject_CallNoArgs(function));
    return answer ? PyObject_IsTrue(answer.get()) : -1;
}

int has(PyObject* tensor, PyObject* attribute) {
    const Reference value(PyObject_GetAttr(tensor, attribute));
    return value ? PyObject_IsTrue(value.get()) : -1;
}

bool is_tensor(PyObject* object) {
    return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(torch_objects.tensor_type));
}

PyObject* boolean(int value) { return value < 0 ? nullptr : PyBool_FromLong(value); }

// 1 if the predicate holds of any tensor of the tuple.
template <class Predicate>
int any_tensor(PyObject* arguments, Predicate predicate) {
    if (!PyTuple_Check(arguments)) {
        PyErr_SetString(PyExc_TypeError, "expected a tuple of arguments");
        return -1;
    }
    int found = 0;
    for (Py_ssize_t i = 0; found == 0 && i < PyTuple_GET_SIZE(arguments); ++i) {
        PyObject* argument = PyTuple_GET_ITEM(arguments, i);
        found = is_tensor(argument) ? predicate(argument) : 0;
    }
    return found;
}

int is_forward_mode() {
    const Reference level(PyObject_GetAttr(torch_objects.forward_ad, torch_objects.current_level));
    return level ? PyLong_AsLong(level.get()) >= 0 : -1;
}

}  // namespace

PyObject* is_traced(PyObject*, PyObject* arguments) {
    for (PyObject* function :
         {torch_objects.num_dispatch_modes, torch_objects.is_profiled, torch_objects.tracing_state}) {
        const int answer = ask(function);
        if (answer != 0) {
            return boolean(answer);
        }
    }
    bool is_first = true;  // the tensors of a call are on one device
    return boolean(any_tensor(arguments, [&is_first](PyObject* tensor) {
        if (!is_plain_tensor(tensor)) {
            return 1;
        }
        return std::exchange(is_first, false) ? has(tensor, torch_objects.is_meta) : 0;
    }));
}

PyObject* needs_autograd(PyObject*, PyObject* arguments) {
    int answer = is_forward_mode();
    if (answer != 0) {
        return boolean(answer);
    }
    answer = ask(torch_objects.is_grad_enabled);
    if (answer == 1) {
        answer = any_tensor(arguments, [](PyObject* tensor) { return has(tensor, torch_objects.requires_grad); });
    }
    return boolean(answer);
}

PyObject* is_direct(PyObject* module, PyObject* arguments) {
    for (PyObject* function : {torch_objects.is_grad_enabled, torch_objects.is_any_autocast_enabled}) {
        const int answer = ask(function);
        if (answer != 0) {
            return answer < 0 ? nullptr : PyBool_FromLong(0);
        }
    }
    const Reference traced(is_traced(module, arguments));
    return traced ? PyBool_FromLong(traced.get() == Py_False) : nullptr;
}

}  // namespace recattn::host
