// The only interface of the kernels to threads. The library implements it with torch's pool
// (csrc/bindings/cpu_parallel.cpp), the sanitizer driver with std::thread (tests/cpu/sanitize).
#pragma once

#include <cstdint>

namespace qlora {

using TaskFunction = void (*)(const void* context, int64_t task);

int num_threads();

// Calls run(context, task) once for each task in [0, tasks), from several threads, and returns when all have finished.
// A free thread takes the next task, so a task must not depend on its thread; results are then the same for any number
// of threads.
void run_tasks(int64_t tasks, TaskFunction run, const void* context);

template <class Body>
static inline void parallel_tasks(int64_t tasks, const Body& body) {
    run_tasks(tasks, [](const void* context, int64_t task) { (*static_cast<const Body*>(context))(task); }, &body);
}

// Splits [0, n) into pieces of at least `grain`, about four per thread, each but the last a multiple of `grain`.
template <class Body>
static inline void parallel_ranges(int64_t n, int64_t grain, const Body& body) {
    if (n <= 0) return;
    const int64_t grains = (n + grain - 1) / grain;
    const int64_t wanted = 4 * static_cast<int64_t>(num_threads());
    const int64_t step = grain * ((grains + wanted - 1) / wanted);
    parallel_tasks((n + step - 1) / step, [&](int64_t task) {
        const int64_t begin = task * step;
        body(begin, begin + step < n ? begin + step : n);
    });
}

}  // namespace qlora
