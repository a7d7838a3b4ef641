// Functions on stacks of their own, which give the turn to each other; the sanitizers are told.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMULATION_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace emulation {

#if defined(__x86_64__) && defined(__linux__)

// A stack that does not run: its top, where the registers lie that its function needs again.
struct Context {
    void* top;
};

extern "C" void recattn_switch_stack(void** from, void* to);
asm(R"(
    .text
    .type recattn_switch_stack, @function
recattn_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size recattn_switch_stack, . - recattn_switch_stack
)");

inline void switch_stack(Context& from, const Context& to) { recattn_switch_stack(&from.top, to.top); }

inline void prepare(Context& context, char* stack, size_t bytes, void (*function)()) {
    // Six registers, the address to return to, and that function's own, null; 16-byte aligned as after a call.
    const auto end = reinterpret_cast<uintptr_t>(stack + bytes) / 16 * 16;
    auto** top = reinterpret_cast<void**>(end) - 8;
    std::memset(top, 0, 8 * sizeof *top);
    top[6] = reinterpret_cast<void*>(function);
    context.top = top;
}

#else

}  // namespace emulation
#include <ucontext.h>
namespace emulation {

using Context = ucontext_t;

// Slower by two system calls.
inline void switch_stack(Context& from, const Context& to) { swapcontext(&from, &to); }

inline void prepare(Context& context, char* stack, size_t bytes, void (*function)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, function, 0);
}

#endif

// What comes before the one is ordered before what comes after the other, for ThreadSanitizer.
inline void released([[maybe_unused]] void* clock) {
#ifdef EMULATION_TSAN
    __tsan_release(clock);
#endif
}

inline void acquired([[maybe_unused]] void* clock) {
#ifdef EMULATION_TSAN
    __tsan_acquire(clock);
#endif
}

class Fiber {
  public:
    // What runs already.
    Fiber() {
#ifdef EMULATION_TSAN
        thread_ = __tsan_get_current_fiber();
#endif
    }

    // The function never returns. Fibers of different numbers begin in different sets of the cache.
    Fiber(void (*function)(), int number) : bytes_(256 << 10), stack_(new char[bytes_]), function_(function) {
        bottom_ = stack_.get();
        prepare(context_, stack_.get(), bytes_ - number % 32 * 256, [] {
            arrive(nullptr);
            running_->function_();
        });
#ifdef EMULATION_TSAN
        thread_ = __tsan_create_fiber(0);
#endif
    }

    Fiber(const Fiber&) = delete;

    ~Fiber() {
        join();
#ifdef EMULATION_TSAN
        if (stack_) __tsan_destroy_fiber(thread_);
#endif
    }

    // Called by this one; returns when another switches back.
    void switch_to(Fiber& to) {
        released(this);
        left_ = this, running_ = &to;
        [[maybe_unused]] void* fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_start_switch_fiber(&fake_stack, to.bottom_, to.bytes_);
#endif
#ifdef EMULATION_TSAN
        __tsan_switch_to_fiber(to.thread_, __tsan_switch_to_fiber_no_sync);
#endif
        switch_stack(context_, to.context_);
        arrive(fake_stack);
    }

    // Orders what the fiber has done before what the caller does.
    void join() { acquired(this); }

  private:
    static inline Fiber *left_, *running_;

    static void arrive([[maybe_unused]] void* fake_stack) {
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_finish_switch_fiber(fake_stack, &left_->bottom_, &left_->bytes_);
#endif
    }

    const void* bottom_ = nullptr;
    size_t bytes_ = 0;
    std::unique_ptr<char[]> stack_;
    void (*function_)() = nullptr;
    Context context_;
    void* thread_ = nullptr;  // as ThreadSanitizer knows it
};

}  // namespace emulation
