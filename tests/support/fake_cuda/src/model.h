// The state of the fake devices. Everything is guarded by one lock; nothing is destroyed at exit, because torch calls
// the runtime from destructors of static objects.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "plugin.h"

#define FAKE_CUDA_API extern "C" __attribute__((visibility("default")))

struct CUctx_st {
    int device;
    int retained;
};

// One record of an event. An event that is recorded again gets another FakeRecord, so that earlier waits, on whatever
// stream, still wait for the record that was the newest when they were enqueued.
struct FakeRecord {
    CUstream stream;
    bool done = false;
    double milliseconds = 0;
};

// An entry of a stream's queue: a function to run, or a record to wait for.
struct FakeWork {
    std::function<CUresult()> run;
    std::shared_ptr<const FakeRecord> awaited;
};

struct CUgraph_st {
    uint64_t id;
    std::vector<std::function<CUresult()>> nodes;  // in the order of the calls, one that the dependencies allow
    bool broken = false;                           // a forbidden call was made during the capture
    bool ended = false;
};

struct CUstream_st {
    int device;
    CUcontext context;
    unsigned flags;
    int priority;
    uint64_t id;
    std::deque<FakeWork> queue;
    CUgraph capture = nullptr;
};

struct CUevent_st {
    int device;
    std::shared_ptr<FakeRecord> newest;  // null: never recorded outside captures
    CUgraph capture = nullptr;           // the last record went into this graph
};

struct CUfunc_st {
    std::string name;
    CUmodule module;
    int dynamic_shared_limit;
};

// What runs kernels (plugin.h); empty where it could not be loaded.
struct KernelLibrary {
    fake_cuda_parameters_function parameters = nullptr;
    fake_cuda_launch_function launch = nullptr;
};

struct CUmod_st {
    const KernelLibrary* library;
    std::map<std::string, CUfunc_st> functions;
    std::map<std::string, std::pair<void*, size_t>> variables;
};

namespace fake_cuda {

inline constexpr int kMaxDevices = 8;
inline constexpr int kHost = -1;  // the device of page-locked host memory
inline constexpr size_t kPage = 4096;

struct Block {
    char *start, *mapping;
    size_t bytes, mapped;
    int device;
    bool managed;
    uint64_t id;
};

enum class Schedule { eager, lazy, random };

struct Model {
    int devices = 1, capability_major = 8, capability_minor = 0, driver_version = 13000;
    size_t device_bytes = size_t{16} << 30, managed_bytes = size_t{64} << 30;
    Schedule schedule = Schedule::eager;
    uint64_t random = 1;
    bool ignores_launches = false;

    std::recursive_mutex lock;
    uint64_t next_id = 1;
    CUctx_st contexts[kMaxDevices];
    std::map<const char*, Block> blocks;  // by start
    size_t used[kMaxDevices] = {}, managed_used = 0;
    CUstream default_streams[kMaxDevices];
    std::vector<CUstream> streams;
    CUresult late_error = CUDA_SUCCESS;  // of work that failed after its call had returned

    Model();
};

Model& model();

// Holds the model's lock. A thread that has to wait for it gives up Python's lock meanwhile: whoever holds the model's
// may be about to run a host function that needs Python's.
class Guard {
  public:
    explicit Guard(std::recursive_mutex& lock);
    ~Guard() { lock_.unlock(); }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

  private:
    std::recursive_mutex& lock_;
};

CUcontext current_context();
void set_current_context(CUcontext context);

// memory.cpp
CUresult allocate(void** pointer, size_t bytes, int device, bool managed);
CUresult release(void* pointer);
Block* find_block(const void* pointer);

// streams.cpp
CUstream resolve(CUstream stream);  // the default streams have handles of their own
CUresult enqueue(CUstream stream, std::function<CUresult()> run);
CUresult synchronize(CUstream stream);
CUresult synchronize_device(int device);  // kHost: all
bool forbidden_during_capture();          // notes the violation in every capture that forbids it

}  // namespace fake_cuda
