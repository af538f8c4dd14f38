// The kernels' only door to threads. The library links the implementation over torch's pool
// (csrc/bindings/cpu_parallel.cpp), the sanitizer driver one over std::thread (tests/cpu/sanitize).
#pragma once

#include <cstdint>

namespace qlora {

using TaskFunction = void (*)(const void* context, int64_t task);

int num_threads();

// Calls run(context, task) once for each task in [0, tasks), from several threads, and returns when all have ended.
// Threads take the next task when they are free, so a task must not depend on who runs it: results are then the same
// for any number of threads.
void run_tasks(int64_t tasks, TaskFunction run, const void* context);

template <class Body>
static inline void parallel_tasks(int64_t tasks, const Body& body) {
    run_tasks(tasks, [](const void* context, int64_t task) { (*static_cast<const Body*>(context))(task); }, &body);
}

// Cuts [0, n) into pieces of at least `grain`, about four per thread, each a multiple of `grain` but the last.
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
