// Triton's Python objects that a launch asks, set by make_launch.
#pragma once
#include "host/python.h"

namespace recattn::host {

struct TritonObjects {
    PyObject* runtime_knobs;
    PyObject* driver;
};

extern TritonObjects triton_objects;

// Whether a hook of a profiler is set, which only Triton's own launch calls.
bool has_launch_hooks();

// The driver in use, its current device and that device's current stream.
class CurrentStream {
  public:
    CurrentStream();

    // False with an exception set.
    explicit operator bool() const { return static_cast<bool>(stream_); }
    long device() const { return device_; }
    PyObject* get() const { return stream_.get(); }

  private:
    Reference stream_;
    long device_ = -1;
};

}  // namespace recattn::host
