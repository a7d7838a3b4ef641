#include "host/expression.h"

#include <bit>
#include <cstdint>

#include "host/torch_objects.h"

namespace recattn::host {

namespace {

long long floor_divide(long long a, long long b) { return a / b - ((a % b != 0) && ((a < 0) != (b < 0)) ? 1 : 0); }

}  // namespace

PyObject* Slot::shape() {
    if (!shape_) {
        shape_ = Reference(PyObject_GetAttr(tensor(), torch_objects.shape));
    }
    return shape_.get();
}

PyObject* Slot::stride() {
    if (!stride_) {
        stride_ = Reference(PyObject_CallMethodNoArgs(tensor(), torch_objects.stride));
    }
    return stride_.get();
}

PyObject* Slot::pointer() {
    if (!pointer_) {
        pointer_ = Reference(PyObject_CallMethodNoArgs(tensor(), torch_objects.data_ptr));
    }
    return pointer_.get();
}

bool Expression::read(PyObject* value, PyObject* expression_type) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(value)) != expression_type) {
        constant_ = PyLong_AsLongLong(value);
        return !PyErr_Occurred();
    }
    Py_ssize_t size = 0;
    const char* operation = PyUnicode_AsUTF8AndSize(PyTuple_GET_ITEM(value, 0), &size);
    if (operation == nullptr || size != 1) {
        return false;
    }
    operation_ = operation[0];
    PyObject *a = PyTuple_GET_ITEM(value, 1), *b = PyTuple_GET_ITEM(value, 2);
    if (operation_ == 's' || operation_ == 't' || operation_ == 'n') {
        slot_ = static_cast<size_t>(PyLong_AsSsize_t(a));
        axis_ = PyLong_AsSsize_t(b);
        return !PyErr_Occurred();
    }
    a_ = std::make_unique<Expression>();
    b_ = std::make_unique<Expression>();
    return a_->read(a, expression_type) && b_->read(b, expression_type);
}

bool Expression::evaluate_symbol(Slot& slot, long long& result) const {
    PyObject* tuple = operation_ == 't' ? slot.stride() : slot.shape();
    if (tuple == nullptr) {
        return false;
    }
    result = 1;
    if (axis_ >= PyTuple_GET_SIZE(tuple) && operation_ != 'n') {
        return false;
    }
    const Py_ssize_t first = operation_ == 'n' ? 0 : axis_;
    const Py_ssize_t end = operation_ == 'n' ? PyTuple_GET_SIZE(tuple) : axis_ + 1;
    for (Py_ssize_t i = first; i < end; ++i) {
        result *= PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
    }
    return true;
}

PyObject* Expression::integer(std::vector<Slot>& slots) const {
    if (operation_ != 's' && operation_ != 't') {
        return nullptr;
    }
    PyObject* tuple = operation_ == 't' ? slots[slot_].stride() : slots[slot_].shape();
    return tuple != nullptr && axis_ < PyTuple_GET_SIZE(tuple) ? PyTuple_GET_ITEM(tuple, axis_) : nullptr;
}

bool Expression::evaluate(std::vector<Slot>& slots, long long& result) const {
    if (operation_ == 'c') {
        result = constant_;
        return true;
    }
    if (!a_) {
        return evaluate_symbol(slots[slot_], result);
    }
    long long a = 0, b = 0;
    if (!a_->evaluate(slots, a) || !b_->evaluate(slots, b)) {
        return false;
    }
    if ((operation_ == '/' || operation_ == '%') && b == 0) {
        PyErr_SetString(PyExc_ZeroDivisionError, "a plan divides by zero");
        return false;
    }
    switch (operation_) {
        case '+':
            result = a + b;
            break;
        case '-':
            result = a - b;
            break;
        case '*':
            result = a * b;
            break;
        case '/':
            result = floor_divide(a, b);
            break;
        case '%':
            result = a - floor_divide(a, b) * b;
            break;
        case 'b':
            result = std::bit_width(static_cast<uint64_t>(a < 0 ? -a : a));
            break;
        default:
            result = a << b;
    }
    return true;
}

}  // namespace recattn::host
