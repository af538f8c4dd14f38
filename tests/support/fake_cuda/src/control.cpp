// Settings from the environment, the record of calls, and failures that tests inject.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "model.h"

using fake_cuda::Guard;
using fake_cuda::model;
using fake_cuda::Schedule;

namespace fake_cuda {
namespace {

struct Failure {
    std::string caller, call;
    int after = -1, error = 0;
    bool happened = false;
};

struct Record {
    std::string calls;
    Failure failure;
    FILE* log = nullptr;
};

Record& record() {
    static Record& all = *new Record;
    return all;
}

int number(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text && *text ? atoi(text) : otherwise;
}

}  // namespace

Model::Model() {
    devices = std::min(number("FAKE_CUDA_DEVICES", 1), kMaxDevices);
    driver_version = number("FAKE_CUDA_DRIVER_VERSION", driver_version);
    if (const char* text = getenv("FAKE_CUDA_CAPABILITY")) sscanf(text, "%d.%d", &capability_major, &capability_minor);
    for (int device = 0; device < kMaxDevices; device++) {
        contexts[device] = {device, 0};
        default_streams[device] = new CUstream_st{device, &contexts[device], 0, 0, next_id++, {}};
        streams.push_back(default_streams[device]);
    }
    const char* log = getenv("FAKE_CUDA_LOG");
    if (log && *log) record().log = strcmp(log, "-") ? fopen(log, "a") : stderr;
}

Guard::Guard(std::recursive_mutex& lock) : lock_(lock) {
    if (lock_.try_lock()) return;
    // This library is loaded into an interpreter and is not linked to one.
    static const auto holds = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
    static const auto release = reinterpret_cast<void* (*)()>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
    static const auto take = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_DEFAULT, "PyEval_RestoreThread"));
    void* const thread = holds && holds() ? release() : nullptr;
    lock_.lock();
    if (thread) take(thread);
}

Model& model() {
    static Model& only = *new Model;
    return only;
}

}  // namespace fake_cuda

FAKE_CUDA_API int fake_cuda_set_schedule(const char* schedule) {
    const Guard guard(model().lock);
    fake_cuda::synchronize_device(fake_cuda::kHost);
    unsigned long long seed = 0;
    if (!strcmp(schedule, "eager"))
        model().schedule = Schedule::eager;
    else if (!strcmp(schedule, "lazy"))
        model().schedule = Schedule::lazy;
    else if (sscanf(schedule, "random:%llu", &seed) == 1)
        model().schedule = Schedule::random, model().random = seed;
    else
        return 1;
    return 0;
}

FAKE_CUDA_API void fake_cuda_set_memory(unsigned long long device_bytes, unsigned long long managed_bytes) {
    const Guard guard(model().lock);
    model().device_bytes = device_bytes;
    model().managed_bytes = managed_bytes;
}

FAKE_CUDA_API void fake_cuda_set_driver_version(int version) { model().driver_version = version; }

FAKE_CUDA_API void fake_cuda_ignore_launches(int ignored) { model().ignores_launches = ignored; }

FAKE_CUDA_API unsigned long long fake_cuda_allocated(void) {
    const Guard guard(model().lock);
    unsigned long long total = model().managed_used;
    for (const size_t bytes : model().used) total += bytes;
    return total;
}

FAKE_CUDA_API void fake_cuda_fail(const char* caller, const char* call, int after, int error) {
    const Guard guard(model().lock);
    fake_cuda::record().failure = {caller, call, after, error, false};
}

FAKE_CUDA_API void fake_cuda_clear_failure(void) { fake_cuda_fail("", "", -1, 0); }

FAKE_CUDA_API int fake_cuda_failed(void) { return fake_cuda::record().failure.happened; }

FAKE_CUDA_API const char* fake_cuda_calls(void) { return fake_cuda::record().calls.c_str(); }

FAKE_CUDA_API void fake_cuda_clear_calls(void) {
    const Guard guard(model().lock);
    fake_cuda::record().calls.clear();
}

FAKE_CUDA_API int fake_cuda_enter(const char* call, const void* return_address) {
    if (model().ignores_launches) return 0;  // a measurement of host time, in which the record would be most of a call
    const Guard guard(model().lock);
    fake_cuda::Record& record = fake_cuda::record();
    Dl_info info{};
    const char* caller = dladdr(return_address, &info) && info.dli_fname ? info.dli_fname : "?";
    record.calls.append(call).append(" ").append(caller).append("\n");
    if (record.log) fprintf(record.log, "%s %s\n", call, caller);
    fake_cuda::Failure& failure = record.failure;
    const bool meant = (failure.call.empty() || failure.call == call) && strstr(caller, failure.caller.c_str());
    if (failure.after < 0 || !meant || failure.after-- > 0) return 0;
    failure.happened = true;
    return failure.error;
}

FAKE_CUDA_API int fake_cuda_unsupported(const char* call) {
    fprintf(stderr, "fake_cuda: %s is not supported\n", call);
    return CUDA_ERROR_NOT_SUPPORTED;
}
