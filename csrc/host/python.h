// The CPython API, and references that are released when they go out of scope.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <utility>

namespace recattn::host {

inline PyObject* new_reference(PyObject* object) {
    Py_INCREF(object);
    return object;
}

class Reference {
  public:
    explicit Reference(PyObject* object = nullptr) : object_(object) {}
    Reference(Reference&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
    Reference& operator=(Reference&& other) noexcept {
        std::swap(object_, other.object_);
        return *this;
    }
    ~Reference() { Py_XDECREF(object_); }

    PyObject* release() { return std::exchange(object_, nullptr); }
    PyObject* get() const { return object_; }
    explicit operator bool() const { return object_ != nullptr; }

  private:
    PyObject* object_;
};

}  // namespace recattn::host
