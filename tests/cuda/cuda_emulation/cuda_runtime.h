// The part of CUDA C++ and its runtime that csrc/cuda uses, for g++: kernels run on a CPU, by emulator.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct alignas(8) uint2 {
    unsigned x, y;
};
struct uint3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

namespace emulation {

using Place = std::source_location;

// Of the thread whose turn it is.
inline uint3 thread_index, block_index;
inline dim3 block_size;

// In a kernel. What takes a place waits for the whole warp (or block) and throws if its threads wait at several.
void synchronize(Place);
void synchronize_warp(Place);
void expect_all_lanes(unsigned mask);
uint32_t ballot(bool, Place);
float shuffle(float, int from_lane, Place);
int lane();
[[noreturn]] void stop(const char* why);
void* shared_memory(size_t bytes);
void* dynamic_shared_memory();

// Throws what a kernel throws, and a runtime_error if its threads wait for each other forever.
cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t dynamic_bytes, const std::function<void()>& body);
cudaError_t grant_dynamic_bytes(const void* kernel, int bytes);
cudaError_t take_last_error();

template <class... P, size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<P*>(arguments[I])...);
}

}  // namespace emulation

#define threadIdx (emulation::thread_index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)

inline void __syncthreads(emulation::Place place = emulation::Place::current()) { emulation::synchronize(place); }

inline void __syncwarp(emulation::Place place = emulation::Place::current()) { emulation::synchronize_warp(place); }

inline uint32_t __ballot_sync(unsigned mask, bool holds, emulation::Place place = emulation::Place::current()) {
    emulation::expect_all_lanes(mask);
    return emulation::ballot(holds, place);
}

inline float __shfl_sync(unsigned mask, float value, int lane, emulation::Place place = emulation::Place::current()) {
    emulation::expect_all_lanes(mask);
    return emulation::shuffle(value, lane, place);
}

inline float __shfl_xor_sync(unsigned mask, float value, int lane_mask,
                             emulation::Place place = emulation::Place::current()) {
    return __shfl_sync(mask, value, emulation::lane() ^ lane_mask, place);
}

[[noreturn]] inline void __trap() { emulation::stop("trap"); }

inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }

// Byte i of the result is the one of (y, x) that hexadecimal digit i of the selector numbers.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= (bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}

inline void __stcg(uint4* address, uint4 value) {
    if (reinterpret_cast<uintptr_t>(address) % alignof(uint4) != 0) emulation::stop("misaligned address");
    *address = value;
}

template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}

template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t dynamic_bytes = 0,
                             cudaStream_t = nullptr) {
    const auto body = [&] { emulation::call(kernel, arguments, std::index_sequence_for<P...>{}); };
    return emulation::launch(reinterpret_cast<const void*>(kernel), grid, block, dynamic_bytes, body);
}

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
    return emulation::grant_dynamic_bytes(reinterpret_cast<const void*>(kernel), bytes);
}

inline cudaError_t cudaGetLastError() { return emulation::take_last_error(); }

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess             ? "no error"
           : error == cudaErrorInvalidValue ? "invalid argument"
                                            : "invalid configuration";
}
