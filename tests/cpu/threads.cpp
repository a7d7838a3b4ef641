// PyTorch's parallel_for and number of threads, for ThreadSanitizer: it does not see how OpenMP's threads wait for each
// other. Splits every range, however small, among three new threads.
#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

constexpr int64_t kThreads = 3;

extern "C" {

__attribute__((visibility("default"))) int32_t torch_get_num_threads(uint32_t* threads) {
    *threads = kThreads;
    return 0;
}

__attribute__((visibility("default"))) int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t,
                                                                  void (*function)(int64_t, int64_t, void*),
                                                                  void* context) {
    const int64_t count = std::min(kThreads, end - begin);
    std::vector<std::thread> threads;
    std::vector<std::exception_ptr> errors(std::max<int64_t>(count, 0));
    for (int64_t i = 0; i < count; ++i) {
        threads.emplace_back([=, &errors] {
            try {
                function(begin + (end - begin) * i / count, begin + (end - begin) * (i + 1) / count, context);
            } catch (...) {
                errors[i] = std::current_exception();
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    for (const std::exception_ptr& error : errors) {
        if (error) std::rethrow_exception(error);
    }
    return 0;
}
}
