#include "host/signature.h"

#include <string>

#include "host/torch_objects.h"

namespace recattn::host {

namespace {

class Signature {
  public:
    Signature() { text_.reserve(512); }

    bool add(PyObject* value) {
        if (value == Py_None) {
            text_ += 'n';
            return true;
        }
        if (PyBool_Check(value)) {
            text_ += value == Py_True ? 't' : 'f';
            return true;
        }
        if (PyLong_Check(value)) {
            text_ += 'i';
            return add_integer(value);
        }
        if (PyFloat_Check(value)) {
            const double number = PyFloat_AS_DOUBLE(value);
            text_ += '.';
            return add_bytes(&number, sizeof number);
        }
        if (PyTuple_Check(value)) {
            return add_tuple(value);
        }
        return PyUnicode_Check(value) ? add_string(value) : add_tensor(value);
    }

    PyObject* bytes() const { return PyBytes_FromStringAndSize(text_.data(), static_cast<Py_ssize_t>(text_.size())); }

  private:
    bool add_bytes(const void* data, size_t size) {
        text_.append(static_cast<const char*>(data), size);
        return true;
    }

    bool add_integer(PyObject* value) {
        const long long number = PyLong_AsLongLong(value);
        return (number != -1 || !PyErr_Occurred()) && add_bytes(&number, sizeof number);
    }

    bool add_tuple(PyObject* tuple) {
        text_ += '(';
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
            if (!add(PyTuple_GET_ITEM(tuple, i))) {
                return false;
            }
        }
        text_ += ')';
        return true;
    }

    bool add_string(PyObject* value) {
        Py_ssize_t size = 0;
        const char* text = PyUnicode_AsUTF8AndSize(value, &size);
        text_ += 's';
        return text != nullptr && add_bytes(&size, sizeof size) && add_bytes(text, static_cast<size_t>(size));
    }

    bool add_tensor(PyObject* tensor) {
        const Reference dtype(PyObject_GetAttr(tensor, torch_objects.dtype));
        const Reference axes(dtype ? PyObject_CallMethodNoArgs(tensor, torch_objects.dim) : nullptr);
        if (!axes) {
            return false;
        }
        const PyObject* address = dtype.get();  // PyTorch's dtypes live as long as it does
        const char kind[] = {'x', static_cast<char>(PyLong_AsLong(axes.get()))};
        return add_bytes(kind, sizeof kind) && add_bytes(&address, sizeof address) &&
               (std::exchange(has_device_, true) || add_device(tensor));
    }

    // Of the first tensor: those of a call are on one device.
    bool add_device(PyObject* tensor) {
        const Reference device(PyObject_CallMethodNoArgs(tensor, torch_objects.get_device));
        return device && add_integer(device.get());
    }

    std::string text_;
    bool has_device_ = false;
};

}  // namespace

PyObject* signature(PyObject*, PyObject* arguments) {
    Signature signature;
    return signature.add(arguments) ? signature.bytes() : nullptr;
}

}  // namespace recattn::host
