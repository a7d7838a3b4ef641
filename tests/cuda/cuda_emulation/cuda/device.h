// csrc/cuda/device.h for emulated kernels: the device is the CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#define RECATTN_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(recattn_emulated, CPU, m)

namespace recattn {

inline bool is_on_device(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }

struct DeviceGuard {
    explicit DeviceGuard(int32_t) {}
};

inline cudaStream_t current_stream(int32_t) { return nullptr; }

}  // namespace recattn
