// For wheels built where glibc is newer than the 2.28 that they must run on: the linker takes these in place of symbols
// that glibc 2.28 and GCC 8's libstdc++ do not have. setup.py wraps the functions (RECATTN_BUILD=manylinux).
#include <pthread.h>

#include <new>
#include <sstream>

#if defined(__x86_64__)
#define OLDEST_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define OLDEST_GLIBC "GLIBC_2.17"
#else
#error "build wheels for this architecture in a manylinux image"
#endif

// These functions are old, but moved from libpthread to libc in 2.34 and got that as their version.
#define WRAP_PTHREAD(name, parameters, arguments)                  \
    extern "C" int recattn_##name parameters;                      \
    __asm__(".symver recattn_" #name ", " #name "@" OLDEST_GLIBC); \
    extern "C" int __wrap_##name parameters { return recattn_##name arguments; }

WRAP_PTHREAD(pthread_once, (pthread_once_t * control, void (*routine)()), (control, routine))
WRAP_PTHREAD(pthread_rwlock_rdlock, (pthread_rwlock_t * lock), (lock))
WRAP_PTHREAD(pthread_rwlock_wrlock, (pthread_rwlock_t * lock), (lock))
WRAP_PTHREAD(pthread_rwlock_unlock, (pthread_rwlock_t * lock), (lock))

// Of glibc 2.32. std::shared_ptr reads it: false means that it must count atomically.
extern "C" char __wrap___libc_single_threaded;
char __wrap___libc_single_threaded = 0;

// Of GCC 11.
extern "C" [[noreturn]] void __wrap__ZSt28__throw_bad_array_new_lengthv() { throw std::bad_array_new_length(); }

// Of GCC 11, where exception_ptr's inline copy and destructor call them. Before, these two were not inline.
extern "C" void copy_exception_ptr(void** self,
                                   void* const* other) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
extern "C" void destroy_exception_ptr(void** self) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");
extern "C" void __wrap__ZNSt15__exception_ptr13exception_ptr9_M_addrefEv(void* const* self) {
    void* copy;  // never destroyed: it is the reference that is added
    copy_exception_ptr(&copy, self);
}
extern "C" void __wrap__ZNSt15__exception_ptr13exception_ptr10_M_releaseEv(void** self) {
    destroy_exception_ptr(self);
    *self = nullptr;
}

// Their default constructors are of GCC 9, their C++20 members of GCC 11.
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;
