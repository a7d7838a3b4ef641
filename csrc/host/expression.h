// Integers made of sizes and strides.
#pragma once
#include <memory>
#include <vector>

#include "host/python.h"

namespace recattn::host {

// A tensor of a replay, and its shape and strides once they are asked for.
class Slot {
  public:
    explicit Slot(PyObject* tensor = nullptr) : tensor_(tensor) {}

    PyObject* tensor() const { return tensor_.get(); }

    // Tuples, borrowed; null with an exception set.
    PyObject* shape();
    PyObject* stride();
    // An integer, borrowed; null with an exception set.
    PyObject* pointer();

  private:
    Reference tensor_, shape_, stride_, pointer_;
};

class Expression {
  public:
    // Of an Expression(operation, a, b), or of an integer. False with an exception set.
    bool read(PyObject* value, PyObject* expression_type);

    // False with an exception set, or without one where a tensor has no such axis.
    bool evaluate(std::vector<Slot>& slots, long long& result) const;

    // A size or stride as the Python integer that it is, borrowed; null where the expression is more than that, and
    // where `evaluate` is false.
    PyObject* integer(std::vector<Slot>& slots) const;

  private:
    bool evaluate_symbol(Slot& slot, long long& result) const;

    char operation_ = 'c';  // constant, or s size, t stride, n numel of a slot, or + - * / % b(it length) <(<)
    long long constant_ = 0;
    size_t slot_ = 0;
    Py_ssize_t axis_ = 0;
    std::unique_ptr<Expression> a_, b_;
};

}  // namespace recattn::host
