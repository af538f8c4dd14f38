// qlora/parallel.h with torch's thread pool: no second threading runtime, and torch.set_num_threads() applies.
#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "qlora/parallel.h"

namespace qlora {

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void run_tasks(int64_t tasks, TaskFunction run, const void* context) {
    const int64_t threads = num_threads();
    if (tasks <= 1 || threads <= 1) {
        for (int64_t task = 0; task < tasks; ++task) run(context, task);
        return;
    }
    // The pool splits its range into equal parts; a shared counter lets threads that finish early take more tasks.
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads < tasks ? threads : tasks, 1, [&](int64_t, int64_t) {
        for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) run(context, task);
    });
}

}  // namespace qlora
