#include "host/layouts.h"

#include <array>
#include <cstdint>

#include "host/torch_objects.h"

namespace recattn::host {

namespace {

constexpr int kMostSymbols = 16;
constexpr long long kUnset = -1;

bool contains(PyObject* tuple, PyObject* item) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
        if (PyTuple_GET_ITEM(tuple, i) == item) {
            return true;
        }
    }
    return false;
}

// Reads the bytes of `layouts` from front to back, and tensors against them.
class Reader {
  public:
    explicit Reader(const char* layouts) : next_(reinterpret_cast<const uint8_t*>(layouts)) {
        num_symbols_ = *next_++;
        sizes_.fill(kUnset);
    }

    // False where the tensor may not be absent.
    bool skip() {
        const bool optional_tensor = (next_[1] & 2) != 0;
        next_ += 2;
        const int axes = *next_++;
        next_ += 2 * axes;
        return optional_tensor;
    }

    bool fits(PyObject* tensor) {
        if (!is_plain_tensor(tensor)) {
            return false;
        }
        const char dtypes = static_cast<char>(*next_++);
        const bool optional_axis = (*next_++ & 1) != 0;
        return fits_dtype(tensor, dtypes) && is_strided(tensor) && on_device(tensor) &&
               fits_shape(tensor, optional_axis);
    }

    PyObject* sizes() const {
        PyObject* tuple = PyTuple_New(num_symbols_);
        for (int i = 0; tuple != nullptr && i < num_symbols_; ++i) {
            PyTuple_SET_ITEM(tuple, i, PyLong_FromLongLong(sizes_[i]));
        }
        return tuple;
    }

  private:
    bool fits_dtype(PyObject* tensor, char dtypes) {
        const Reference dtype(PyObject_GetAttr(tensor, torch_objects.dtype));
        if (first_dtype_ == nullptr) {
            first_dtype_ = dtype.get();
        }
        switch (dtypes) {
            case 'F':
                return contains(torch_objects.floating, dtype.get());
            case 'I':
                return contains(torch_objects.integer, dtype.get());
            case 'B':
                return dtype.get() == torch_objects.boolean;
            default:
                return dtype.get() == first_dtype_;
        }
    }

    static bool is_strided(PyObject* tensor) {
        const Reference layout(PyObject_GetAttr(tensor, torch_objects.layout));
        return layout.get() == torch_objects.strided;
    }

    bool on_device(PyObject* tensor) {
        Reference device(PyObject_GetAttr(tensor, torch_objects.device));
        if (!first_device_) {
            first_device_ = std::move(device);
            return static_cast<bool>(first_device_);
        }
        return device && PyObject_RichCompareBool(device.get(), first_device_.get(), Py_EQ) == 1;
    }

    bool fits_shape(PyObject* tensor, bool optional_axis) {
        const Reference shape(PyObject_GetAttr(tensor, torch_objects.shape));  // a nested tensor has none
        if (!shape || !PyTuple_Check(shape.get())) {
            return false;
        }
        int axes = *next_++;
        const Py_ssize_t dim = PyTuple_GET_SIZE(shape.get());
        if (optional_axis && dim == axes - 1) {
            next_ += 2;
            --axes;
        }
        if (dim != axes) {
            return false;
        }
        for (int i = 0; i < axes; ++i, next_ += 2) {
            const long long size = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.get(), i));
            if (!fits_axis(static_cast<char>(next_[0]), next_[1], size)) {
                return false;
            }
        }
        return true;
    }

    bool fits_axis(char kind, uint8_t operand, long long size) {
        switch (kind) {
            case 'n':
                return size == operand;
            case '1':
                return size == 1 || size == sizes_[operand];
            case '+':
                return fits_symbol(operand, size - 1);
            default:
                return fits_symbol(operand, size);
        }
    }

    bool fits_symbol(uint8_t symbol, long long size) {
        if (sizes_[symbol] == kUnset) {
            sizes_[symbol] = size;
        }
        return sizes_[symbol] == size && size >= 0;
    }

    const uint8_t* next_;
    int num_symbols_;
    std::array<long long, kMostSymbols> sizes_;
    const PyObject* first_dtype_ = nullptr;
    Reference first_device_;
};

}  // namespace

PyObject* sizes(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count < 1 || !PyBytes_Check(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "sizes takes bytes and the tensors that they describe");
        return nullptr;
    }
    Reader reader(PyBytes_AS_STRING(arguments[0]));
    for (Py_ssize_t i = 1; i < count; ++i) {
        if (!(arguments[i] == Py_None ? reader.skip() : reader.fits(arguments[i]))) {
            PyErr_Clear();
            Py_RETURN_NONE;
        }
    }
    return reader.sizes();
}

}  // namespace recattn::host
