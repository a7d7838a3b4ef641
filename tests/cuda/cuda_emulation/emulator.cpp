// Runs CUDA threads on a CPU: a block at a time, each thread on a stack of its own, in turns that end where it waits
// for others. Turns are drawn, and so is the order of blocks (by EMULATION_SEED). Shared memory is NaN at first. What a
// GPU would do silently or for ever is an exception: __syncthreads that some thread of the block does not reach, or an
// instruction of a warp without all its lanes.
//
// AddressSanitizer sees shared memory end where it does. ThreadSanitizer (then this file itself is compiled without it,
// with -DEMULATION_TSAN) sees each CUDA thread as a thread, ordered by nothing but what they wait at together.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/mma.h"
#include "fiber.h"

namespace emulation {
namespace {

constexpr int kLanes = 32, kMostThreads = 1024;
constexpr size_t kStaticBytes = 48 << 10;  // also the dynamic ones that a kernel has unasked
constexpr size_t kMostDynamicBytes = 227 << 10;
constexpr unsigned kMostBlocks = 65535;  // of a grid along y and z

// Where threads first .. first+size of a block wait for each other.
struct Meeting {
    int first, size;
    int waiting = 0, returned = 0;
    const char* instruction = "";
    Place place = {};
    char rounds[2] = {};  // ThreadSanitizer's clocks, in turns: a thread may come again before all others have left
    int round = 0;
};

struct Thread {
    std::unique_ptr<Fiber> fiber;
    void* operand = nullptr;  // of the instruction it waits at
};

std::mutex one_launch;
std::map<const void*, size_t> granted;
cudaError_t last_error = cudaSuccess;
const std::function<void()>* kernel_body;
std::vector<Thread> threads(kMostThreads);
std::vector<Meeting> warps;
Meeting block;
Thread* current;
std::vector<Thread*> ready;
Fiber* host;  // to which the turn goes when no thread can go on
std::exception_ptr failure;
alignas(128) char static_memory[kStaticBytes], dynamic_memory[kMostDynamicBytes];
size_t static_bytes;
char begun;  // a clock

// AddressSanitizer lets nobody touch what lies behind.
void limit_memory([[maybe_unused]] char* memory, [[maybe_unused]] size_t size, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(memory, bytes);
    __asan_poison_memory_region(memory + bytes, size - bytes);
#endif
}

void begin_memory(char* memory, size_t size, size_t bytes) {
    limit_memory(memory, size, bytes);
    std::memset(memory, 0xff, bytes);  // NaN
}

int rank_of(const Thread* thread) { return static_cast<int>(thread - threads.data()); }

Meeting& warp_of_current() { return warps[rank_of(current) / kLanes]; }

const char* const seed = std::getenv("EMULATION_SEED");
uint64_t random_state = seed ? std::atoll(seed) : 1;

unsigned random_below(size_t bound) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (random_state >> 32) * bound >> 32;
}

void give_turn_away(Fiber& mine) {
    Fiber* to = host;
    if (!ready.empty() && !failure) {
        std::swap(ready[random_below(ready.size())], ready.back());
        current = ready.back();
        ready.pop_back();
        thread_index = {static_cast<unsigned>(rank_of(current)), 0, 0};
        to = current->fiber.get();
    }
    if (to != &mine) mine.switch_to(*to);
}

[[noreturn]] void fail(const std::string& why) {
    const auto at = [](const uint3& i) {
        return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
    };
    throw std::runtime_error("emulated kernel: " + why + " in block " + at(block_index));
}

std::string text(const char* instruction, const Place& place) {
    const std::string file = place.file_name();
    return instruction + (" at " + file.substr(file.rfind('/') + 1)) + ":" + std::to_string(place.line());
}

bool same(const Place& a, const Place& b) {
    return a.line() == b.line() && (a.file_name() == b.file_name() || !std::strcmp(a.file_name(), b.file_name()));
}

// Waits until all threads of the meeting are there; the last to come acts for all.
template <class Act>
void meet(Meeting& meeting, const char* instruction, const Place& place, void* operand, const Act& act) {
    if (meeting.returned > 0) fail(text(instruction, place) + " behind which a thread has returned");
    if (meeting.waiting > 0 && !same(meeting.place, place)) {
        fail("threads wait both at " + text(meeting.instruction, meeting.place) + " and at " +
             text(instruction, place));
    }
    meeting.instruction = instruction, meeting.place = place;
    current->operand = operand;
    char* clock = &meeting.rounds[meeting.round % 2];
    released(clock);
    if (++meeting.waiting == meeting.size) {
        act(&threads[meeting.first]);
        for (int i = 0; i < meeting.size; ++i) ready.push_back(&threads[meeting.first + i]);
        meeting.waiting = 0, ++meeting.round;
    }
    give_turn_away(*current->fiber);
    acquired(clock);
}

// What a fiber does for ever: a thread of one block after another.
void run_threads() {
    while (true) {
        acquired(&begun);
        try {
            (*kernel_body)();
        } catch (...) {
            failure = std::current_exception();
        }
        ++block.returned, ++warp_of_current().returned;
        give_turn_away(*current->fiber);
    }
}

std::string deadlock() {
    std::string message = "its threads wait for each other:";
    const auto add = [&](const Meeting& meeting) {
        if (meeting.waiting == 0) return;
        message += " " + std::to_string(meeting.waiting) + " of " + std::to_string(meeting.size) + " at " +
                   text(meeting.instruction, meeting.place) + ",";
    };
    add(block);
    for (const Meeting& warp : warps) add(warp);
    return message + " " + std::to_string(block.returned) + " have returned";
}

void run_block(int size, size_t dynamic_bytes) {
    static_bytes = 0;
    // The kernel says later how many of the static bytes are its own.
    begin_memory(static_memory, kStaticBytes, kStaticBytes);
    limit_memory(static_memory, kStaticBytes, 0);
    begin_memory(dynamic_memory, kMostDynamicBytes, dynamic_bytes);
    block = {0, size};
    warps.clear();
    for (int first = 0; first < size; first += kLanes) warps.push_back({first, kLanes});
    ready.clear(), ready.reserve(kMostThreads);
    for (int i = 0; i < size; ++i) {
        if (!threads[i].fiber) threads[i].fiber = std::make_unique<Fiber>(run_threads, i);
        ready.push_back(&threads[i]);
    }
    released(&begun);
    give_turn_away(*host);
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    if (block.returned < size) fail(deadlock());
    for (int i = 0; i < size; ++i) threads[i].fiber->join();
}

}  // namespace

void synchronize(Place place) {
    meet(block, "__syncthreads", place, nullptr, [](Thread*) {});
}

void synchronize_warp(Place place) {
    meet(warp_of_current(), "__syncwarp", place, nullptr, [](Thread*) {});
}

int lane() { return rank_of(current) % kLanes; }

void expect_all_lanes(unsigned mask) {
    if (mask != 0xffffffff) fail("not emulated: a mask without all lanes");
}

uint32_t ballot(bool holds, Place place) {
    uint32_t word = holds;
    meet(warp_of_current(), "__ballot_sync", place, &word, [](Thread* lanes) {
        uint32_t all = 0;
        for (int i = 0; i < kLanes; ++i) all |= *static_cast<uint32_t*>(lanes[i].operand) << i;
        for (int i = 0; i < kLanes; ++i) *static_cast<uint32_t*>(lanes[i].operand) = all;
    });
    return word;
}

float shuffle(float value, int from_lane, Place place) {
    struct Operand {
        float given, got;
        int from;
    } operand{value, 0.f, from_lane % kLanes};
    meet(warp_of_current(), "__shfl_sync", place, &operand, [](Thread* lanes) {
        for (int i = 0; i < kLanes; ++i) {
            Operand& mine = *static_cast<Operand*>(lanes[i].operand);
            mine.got = static_cast<Operand*>(lanes[mine.from].operand)->given;
        }
    });
    return operand.got;
}

void stop(const char* why) { fail(why); }

void* shared_memory(size_t bytes) {
    if (static_bytes != 0 && static_bytes != bytes) fail("more than one shared variable");
    if (static_bytes == 0) limit_memory(static_memory, kStaticBytes, bytes);
    static_bytes = bytes;
    return static_memory;
}

void* dynamic_shared_memory() { return dynamic_memory; }

cudaError_t grant_dynamic_bytes(const void* kernel, int bytes) {
    if (bytes < 0 || static_cast<size_t>(bytes) > kMostDynamicBytes) return last_error = cudaErrorInvalidValue;
    granted[kernel] = bytes;
    return cudaSuccess;
}

cudaError_t take_last_error() { return std::exchange(last_error, cudaSuccess); }

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t dynamic_bytes, const std::function<void()>& body) {
    const std::lock_guard lock(one_launch);
    const size_t most_bytes = granted.count(kernel) ? granted[kernel] : kStaticBytes;
    if (dynamic_bytes > most_bytes) return last_error = cudaErrorInvalidValue;
    const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    const uint64_t size = static_cast<uint64_t>(block.x) * block.y * block.z;
    if (blocks == 0 || grid.x > INT32_MAX || std::max(grid.y, grid.z) > kMostBlocks || size == 0 ||
        size > kMostThreads) {
        return last_error = cudaErrorInvalidConfiguration;
    }
    if (block.x != size || size % kLanes != 0)
        throw std::runtime_error("not emulated: a block that is no row of warps");
    kernel_body = &body;
    block_size = block;
    Fiber caller;
    host = &caller;
    // In random order too, by steps that have no divisor in common with their number.
    uint64_t id = random_below(blocks), step = 1 + random_below(blocks);
    while (std::gcd(step, blocks) != 1) ++step;
    try {
        for (uint64_t i = 0; i < blocks; ++i, id = (id + step) % blocks) {
            block_index = {static_cast<unsigned>(id % grid.x), static_cast<unsigned>(id / grid.x % grid.y),
                           static_cast<unsigned>(id / grid.x / grid.y)};
            run_block(static_cast<int>(size), dynamic_bytes);
        }
    } catch (...) {
        for (Thread& thread : threads) thread.fiber.reset();  // some wait in the middle of the kernel
        throw;
    }
    return cudaSuccess;
}

}  // namespace emulation

namespace recattn {

// Lane 4g + t of a warp holds of A [16, 16], B [16, 8] and C [16, 8] what csrc/cuda/mma.h says.
template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emulation::Place place) {
    using namespace emulation;
    struct Operand {
        float* c;
        const uint32_t* a;
        uint32_t b[2];
    } operand{c, a, {b0, b1}};
    meet(warp_of_current(), "mma", place, &operand, [](Thread* lanes) {
        const auto number = [](uint32_t word, int half) {
            return static_cast<float>(T(static_cast<uint16_t>(word >> 16 * half), T::from_bits()));
        };
        float left[16][16], right[16][8], sums[16][8];
        const auto each = [&](const auto& visit) {
            for (int lane = 0; lane < kLanes; ++lane) {
                visit(lane / 4, lane % 4 * 2, *static_cast<Operand*>(lanes[lane].operand));
            }
        };
        each([&](int row, int column, const Operand& mine) {
            for (int half = 0; half < 2; ++half) {
                for (int i = 0; i < 4; ++i) {
                    left[row + i % 2 * 8][column + i / 2 * 8 + half] = number(mine.a[i], half);
                }
                for (int i = 0; i < 2; ++i) right[column + i * 8 + half][row] = number(mine.b[i], half);
            }
            for (int i = 0; i < 4; ++i) sums[row + i / 2 * 8][column + i % 2] = mine.c[i];
        });
        for (int m = 0; m < 16; ++m) {
            for (int k = 0; k < 16; ++k) {
                for (int n = 0; n < 8; ++n) sums[m][n] += left[m][k] * right[k][n];
            }
        }
        each([&](int row, int column, const Operand& mine) {
            for (int i = 0; i < 4; ++i) mine.c[i] = sums[row + i / 2 * 8][column + i % 2];
        });
    });
}

template void multiply_add<__half>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t, emulation::Place);
template void multiply_add<__nv_bfloat16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t, emulation::Place);

}  // namespace recattn
