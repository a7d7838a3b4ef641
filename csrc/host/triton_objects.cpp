#include "host/triton_objects.h"

namespace recattn::host {

TritonObjects triton_objects;

namespace {

PyObject* intern(const char* name) { return PyUnicode_InternFromString(name); }

// A chain of calls that is not empty, or a function.
bool has_hook(PyObject* name) {
    static PyObject* calls_name = intern("calls");
    const Reference hook(PyObject_GetAttr(triton_objects.runtime_knobs, name));
    if (!hook || hook.get() == Py_None) {
        PyErr_Clear();
        return false;
    }
    const Reference calls(PyObject_GetAttr(hook.get(), calls_name));
    PyErr_Clear();
    return !calls || PyObject_IsTrue(calls.get()) == 1;
}

}  // namespace

bool has_launch_hooks() {
    static PyObject *enter = intern("launch_enter_hook"), *leave = intern("launch_exit_hook");
    return has_hook(enter) || has_hook(leave);
}

CurrentStream::CurrentStream() {
    static PyObject *active = intern("active"), *get_current_device = intern("get_current_device"),
                    *get_current_stream = intern("get_current_stream");
    const Reference driver(PyObject_GetAttr(triton_objects.driver, active));
    const Reference device(driver ? PyObject_CallMethodNoArgs(driver.get(), get_current_device) : nullptr);
    if (device) {
        device_ = PyLong_AsLong(device.get());
        stream_ = Reference(PyObject_CallMethodOneArg(driver.get(), get_current_stream, device.get()));
    }
}

}  // namespace recattn::host
