#include "host/launch.h"

#include <array>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "host/torch_objects.h"
#include "host/triton_objects.h"

namespace recattn::host {

namespace {

// What launch knows of a kernel. It lives as long as the process, as the kernel does.
struct Kernel {
    Reference self;
    std::string specialized;  // empty: only Triton can launch it
    Py_ssize_t num_constants = 0;
    std::unordered_map<std::string, Reference> compiled;
};

struct Launcher {
    Reference describe, launch_by_triton;
    Reference recorder;
    unsigned long recording_thread = 0;
    std::unordered_map<PyObject*, Kernel> kernels;
};

// Writes the key of a launch, and collects what Triton's launcher takes.
class Launch {
  public:
    Launch(const char* device, size_t size) : key_(device, size) { key_.reserve(512); }

    bool add_argument(PyObject* value, bool specialized) { return add(launched(value, specialized)); }

    bool add_constant(PyObject* name, PyObject* value, bool of_kernel) {
        return write_string(name) && write_constant(value) && (!of_kernel || add(new_reference(value)));
    }

    const std::string& key() const { return key_; }

    PyObject* run(PyObject* compiled, PyObject* const* grid, PyObject* stream) const {
        std::vector<PyObject*> values(kFirst + values_.size(), Py_None);  // no launch_metadata, and no hooks
        values[0] = grid[0], values[1] = grid[1], values[2] = grid[2];
        values[3] = stream;
        values[4] = PyTuple_GET_ITEM(compiled, 1);
        values[5] = PyTuple_GET_ITEM(compiled, 2);
        for (size_t i = 0; i < values_.size(); ++i) {
            values[kFirst + i] = values_[i].get();
        }
        return PyObject_Vectorcall(PyTuple_GET_ITEM(compiled, 0), values.data(), values.size(), nullptr);
    }

  private:
    static constexpr size_t kFirst = 9;  // arguments of CompiledKernel.run before the kernel's

    bool add(PyObject* value) {
        values_.emplace_back(value);
        return value != nullptr;
    }

    // What the launcher takes for an argument, a new reference.
    PyObject* launched(PyObject* value, bool specialized) {
        if (value == Py_None) {
            key_ += 'n';
        } else if (PyBool_Check(value)) {
            key_ += value == Py_True ? 't' : 'f';
        } else if (PyLong_Check(value)) {
            return write_class(value, specialized) ? new_reference(value) : nullptr;
        } else if (PyFloat_Check(value)) {
            key_ += '.';
        } else {
            return PyTuple_Check(value) ? launched_tuple(value) : launched_tensor(value);
        }
        return new_reference(value);
    }

    // Triton makes 1 a constant, and tells the compiler what is divisible by 16.
    bool write_class(PyObject* value, bool specialized) {
        const long long number = PyLong_AsLongLong(value);
        key_ += number == static_cast<int32_t>(number) ? 'i' : 'l';
        if (specialized) {
            key_ += number == 1 ? '1' : number % 16 == 0 ? 'd' : '-';
        }
        return number != -1 || !PyErr_Occurred();
    }

    // Triton specializes on all fields of a tuple.
    PyObject* launched_tuple(PyObject* tuple) {
        key_ += '(';
        const Py_ssize_t size = PyTuple_GET_SIZE(tuple);
        Reference fields(PyTuple_New(size));
        for (Py_ssize_t i = 0; fields && i < size; ++i) {
            PyObject* field = launched(PyTuple_GET_ITEM(tuple, i), true);
            if (field == nullptr) {
                return nullptr;
            }
            PyTuple_SET_ITEM(fields.get(), i, field);
        }
        key_ += ')';
        return fields.release();
    }

    PyObject* launched_tensor(PyObject* tensor) {
        const Reference dtype(PyObject_GetAttr(tensor, torch_objects.dtype));
        Reference pointer(dtype ? PyObject_CallMethodNoArgs(tensor, torch_objects.data_ptr) : nullptr);
        if (!pointer) {
            return nullptr;
        }
        key_ += PyLong_AsUnsignedLongLongMask(pointer.get()) % 16 == 0 ? 'X' : 'x';
        const PyObject* address = dtype.get();  // PyTorch's dtypes live as long as it does
        key_.append(reinterpret_cast<const char*>(&address), sizeof address);
        return pointer.release();
    }

    bool write_string(PyObject* value) {
        Py_ssize_t size = 0;
        const char* text = PyUnicode_AsUTF8AndSize(value, &size);
        if (text != nullptr) {
            key_.append(text, static_cast<size_t>(size)) += '=';
        }
        return text != nullptr;
    }

    bool write_constant(PyObject* value) {
        if (PyBool_Check(value) || value == Py_None) {
            key_ += value == Py_True ? 't' : value == Py_False ? 'f' : 'n';
            return true;
        }
        if (!PyLong_Check(value)) {
            return write_string(value);
        }
        const long long number = PyLong_AsLongLong(value);
        key_.append(reinterpret_cast<const char*>(&number), sizeof number);
        return number != -1 || !PyErr_Occurred();
    }

    std::string key_;
    std::vector<Reference> values_;
};

// A launch as it was called: kernel, grid and arguments, then constants by keyword.
struct Call {
    PyObject* const* values;
    Py_ssize_t num_arguments;
    PyObject* keywords;  // a tuple, or null

    PyObject* kernel() const { return values[0]; }
    PyObject* grid() const { return values[1]; }
    PyObject* argument(Py_ssize_t i) const { return values[2 + i]; }
    Py_ssize_t num_keywords() const { return keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords); }
    PyObject* constant(Py_ssize_t i) const { return values[2 + num_arguments + i]; }
};

// The kernel's description; null with an exception set if there is none.
Kernel* find_kernel(Launcher& launcher, PyObject* kernel) {
    const auto found = launcher.kernels.find(kernel);
    if (found != launcher.kernels.end()) {
        return &found->second;
    }
    const Reference description(PyObject_CallOneArg(launcher.describe.get(), kernel));
    if (!description) {
        return nullptr;
    }
    Kernel& made = launcher.kernels[kernel];
    made.self = Reference(new_reference(kernel));
    if (description.get() != Py_None) {
        PyObject* specialized = PyTuple_GetItem(description.get(), 0);
        made.specialized.assign(PyBytes_AS_STRING(specialized), static_cast<size_t>(PyBytes_GET_SIZE(specialized)));
        made.num_constants = PyLong_AsSsize_t(PyTuple_GetItem(description.get(), 1));
    }
    return &made;
}

bool is_watched(PyObject* kernel) {
    static PyObject* pre_run_hooks = PyUnicode_InternFromString("pre_run_hooks");
    const Reference hooks(PyObject_GetAttr(kernel, pre_run_hooks));
    return !hooks || PyObject_IsTrue(hooks.get()) != 0 || has_launch_hooks();
}

// The index of the CUDA device of the first argument, or of its first field; -1 for a CPU.
long device_of(const Call& call) {
    PyObject* first = call.num_arguments > 0 ? call.argument(0) : Py_None;
    if (PyTuple_Check(first) && PyTuple_GET_SIZE(first) > 0) {
        first = PyTuple_GET_ITEM(first, 0);
    }
    const Reference index(PyObject_CallMethodNoArgs(first, torch_objects.get_device));
    return index ? PyLong_AsLong(index.get()) : -1;
}

PyObject* by_triton(const Launcher& launcher, const Call& call) {
    const size_t count = static_cast<size_t>(2 + call.num_arguments);
    return PyObject_Vectorcall(launcher.launch_by_triton.get(), call.values, count, call.keywords);
}

// False with an exception set, or without one where an argument is none that this launcher knows.
bool collect(Launch& launch, const Kernel& kernel, const Call& call) {
    for (Py_ssize_t i = 0; i < call.num_arguments; ++i) {
        if (!launch.add_argument(call.argument(i), kernel.specialized[static_cast<size_t>(i)] != 0)) {
            return false;
        }
    }
    for (Py_ssize_t i = 0; i < call.num_keywords(); ++i) {
        if (!launch.add_constant(PyTuple_GET_ITEM(call.keywords, i), call.constant(i), i < kernel.num_constants)) {
            return false;
        }
    }
    return true;
}

// The axes of a grid of one to three; the rest are 1.
bool read_grid(PyObject* grid, std::array<PyObject*, 3>& axes) {
    static PyObject* one = PyLong_FromLong(1);
    if (!PyTuple_Check(grid) || PyTuple_GET_SIZE(grid) > 3) {
        return false;
    }
    for (Py_ssize_t axis = 0; axis < 3; ++axis) {
        axes[static_cast<size_t>(axis)] = axis < PyTuple_GET_SIZE(grid) ? PyTuple_GET_ITEM(grid, axis) : one;
    }
    return true;
}

PyObject* launch(Launcher& launcher, const Call& call) {
    Kernel* kernel = find_kernel(launcher, call.kernel());
    if (kernel == nullptr) {
        return nullptr;
    }
    std::array<PyObject*, 3> grid;
    const bool known = static_cast<size_t>(call.num_arguments) <= kernel->specialized.size();
    if (!known || is_watched(call.kernel()) || !read_grid(call.grid(), grid)) {
        return PyErr_Occurred() ? nullptr : by_triton(launcher, call);
    }
    const CurrentStream stream;
    const long wanted = stream ? device_of(call) : -1;
    if (PyErr_Occurred()) {
        return nullptr;
    }
    if (wanted >= 0 && wanted != stream.device()) {
        return by_triton(launcher, call);
    }
    const long device = stream.device();
    Launch launch(reinterpret_cast<const char*>(&device), sizeof device);
    if (!collect(launch, *kernel, call)) {
        return nullptr;
    }
    const auto found = kernel->compiled.find(launch.key());
    if (found != kernel->compiled.end()) {
        Reference compiled(new_reference(found->second.get()));
        const Reference result(launch.run(compiled.get(), grid.data(), stream.get()));
        return result ? compiled.release() : nullptr;
    }
    PyObject* compiled = by_triton(launcher, call);
    if (compiled != nullptr && compiled != Py_None) {
        kernel->compiled[launch.key()] = Reference(new_reference(compiled));
    }
    return compiled;
}

Launcher* launcher_of(PyObject* capsule) { return static_cast<Launcher*>(PyCapsule_GetPointer(capsule, "launcher")); }

PyObject* call_launch(PyObject* capsule, PyObject* const* values, Py_ssize_t count, PyObject* keywords) {
    Launcher* launcher = launcher_of(capsule);
    if (launcher == nullptr) {
        return nullptr;
    }
    if (count < 2) {
        PyErr_SetString(PyExc_TypeError, "launch takes a kernel, a grid, and the kernel's arguments");
        return nullptr;
    }
    if (launcher->recorder && launcher->recording_thread == PyThread_get_thread_ident()) {
        return PyObject_Vectorcall(launcher->recorder.get(), values, static_cast<size_t>(count), keywords);
    }
    return launch(*launcher, Call{values, count - 2, keywords});
}

PyMethodDef launch_method = {"launch", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_launch)),
                             METH_FASTCALL | METH_KEYWORDS,
                             "launch(kernel, grid, *arguments, **constants): csrc/host/launch.h"};

}  // namespace

PyObject* make_launch(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "make_launch takes describe, launch_by_triton, runtime_knobs and driver");
        return nullptr;
    }
    triton_objects = {.runtime_knobs = new_reference(arguments[2]), .driver = new_reference(arguments[3])};
    auto* launcher = new Launcher;  // as long as the process
    launcher->describe = Reference(new_reference(arguments[0]));
    launcher->launch_by_triton = Reference(new_reference(arguments[1]));
    const Reference capsule(PyCapsule_New(launcher, "launcher", nullptr));
    return capsule ? PyCFunction_New(&launch_method, capsule.get()) : nullptr;
}

PyObject* set_recorder(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 2 || !PyCFunction_Check(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "set_recorder takes the function of make_launch, and a recorder or None");
        return nullptr;
    }
    Launcher* launcher = launcher_of(PyCFunction_GET_SELF(arguments[0]));
    if (launcher == nullptr) {
        return nullptr;
    }
    launcher->recorder = arguments[1] == Py_None ? Reference() : Reference(new_reference(arguments[1]));
    launcher->recording_thread = PyThread_get_thread_ident();
    Py_RETURN_NONE;
}

}  // namespace recattn::host
