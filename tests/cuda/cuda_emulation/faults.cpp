// Kernels with a fault each: what becomes of the one that is named is printed.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "cuda/shared_memory.h"

namespace {

__global__ void returns_before_a_barrier() {
    if (threadIdx.x == 40) return;
    __syncthreads();
}

__global__ void waits_at_two_barriers() {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

__global__ void votes_without_a_lane() {
    if (threadIdx.x == 40) return;
    __ballot_sync(0xffffffff, true);
}

__global__ void waits_for_a_vote() {
    if (threadIdx.x == 40) {
        __syncthreads();
    } else {
        __ballot_sync(0xffffffff, true);
    }
}

__global__ void traps() {
    __syncthreads();
    if (threadIdx.x == 40) __trap();
    __syncthreads();
}

struct Sums {
    float of_thread[64];
};

__global__ void reads_shared_memory_first() {
    RECATTN_SHARED_MEMORY(Sums, sums);
    RECATTN_DYNAMIC_SHARED_MEMORY(float, dynamic);
    const bool is_nan = std::isnan(sums.of_thread[threadIdx.x]) && std::isnan(dynamic[threadIdx.x]);
    sums.of_thread[threadIdx.x] = dynamic[threadIdx.x] = 0.f;  // which the next block must not see
    if (!is_nan) __trap();
}

__global__ void reads_before_another_writes() {
    RECATTN_SHARED_MEMORY(Sums, sums);
    sums.of_thread[threadIdx.x] = 1.f;
    if (std::isnan(sums.of_thread[63 - threadIdx.x])) __trap();
}

__global__ void writes_behind_shared_memory() {
    RECATTN_DYNAMIC_SHARED_MEMORY(char, dynamic);
    if (threadIdx.x == 63) dynamic[64 * sizeof(float)] = 1;
}

}  // namespace

int main(int, char** argument) {
    const struct {
        const char* name;
        void (*kernel)();
        int dynamic_bytes = 64 * sizeof(float);
    } faults[] = {{"return", returns_before_a_barrier},
                  {"two barriers", waits_at_two_barriers},
                  {"vote", votes_without_a_lane},
                  {"deadlock", waits_for_a_vote},
                  {"trap", traps},
                  {"uninitialised", reads_shared_memory_first},
                  {"no barrier", reads_before_another_writes},
                  {"behind", writes_behind_shared_memory},
                  {"too much", traps, 49 << 10}};
    for (const auto& fault : faults) {
        if (std::strcmp(fault.name, argument[1]) != 0) continue;
        try {
            cudaLaunchKernel(fault.kernel, dim3(3), dim3(64), nullptr, fault.dynamic_bytes);
            std::puts(cudaGetErrorString(cudaGetLastError()));
        } catch (const std::runtime_error& error) {
            std::puts(error.what());
        }
    }
}
