// PyTorch's CUDA device and stream. tests/cuda/cuda_emulation has its own version, for which the device is the CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#define RECATTN_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(recattn, CUDA, m)

namespace recattn {

inline bool is_on_device(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(int32_t device_index) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
    return static_cast<cudaStream_t>(stream);
}

}  // namespace recattn
