// What the fake driver asks of a kernel library, and what it offers to one and to tests. C, because both sides are
// loaded with dlopen.
#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// One launch. Device memory is host memory: pointers among the parameters can be followed.
struct fake_cuda_launch {
    const char* kernel;  // mangled, as the module names it
    unsigned grid[3], block[3], shared_bytes;
    int device;
    void** parameters;  // one pointer for each parameter
};

// Exported by a kernel library (FAKE_CUDA_KERNELS): offsets and sizes of the parameters of `kernel`, their number as
// the result; -1 for a kernel that it does not have.
typedef int (*fake_cuda_parameters_function)(const char* kernel, unsigned* offsets, unsigned* bytes, int capacity);
#define FAKE_CUDA_PARAMETERS "fake_cuda_kernel_parameters"

// Exported by a kernel library: runs a launch. Returns a CUresult.
typedef int (*fake_cuda_launch_function)(const struct fake_cuda_launch*);
#define FAKE_CUDA_LAUNCH "fake_cuda_kernel_launch"

// Compiles PTX text into a kernel library and writes its path, at most `capacity` bytes with the final zero. Returns 0
// where that succeeds.
typedef int (*fake_cuda_translate_function)(const char* ptx, char* path, size_t capacity);

// Exported by the driver: what a module is translated with whose image is PTX text.
void fake_cuda_set_translator(fake_cuda_translate_function translate);

// Exported by the driver. The device that owns this memory; -1 for host memory and for managed memory.
int fake_cuda_owner(const void* pointer);

// Control, exported by the driver and called by tests.
int fake_cuda_set_schedule(const char* schedule);  // "eager", "lazy", "random:SEED"; 0 where it is one of these
void fake_cuda_set_memory(unsigned long long device_bytes, unsigned long long managed_bytes);
void fake_cuda_set_driver_version(int version);
// Launches succeed and run nothing, and calls are not noted: for measurements of host time.
void fake_cuda_ignore_launches(int ignored);
// The call number `after` (0: the next one) of the runtime function `call` ("" for any), made by the library whose path
// contains `caller` ("" for any), returns `error`; calls before and after it are served.
void fake_cuda_fail(const char* caller, const char* call, int after, int error);
void fake_cuda_clear_failure(void);
int fake_cuda_failed(void);                    // whether the failure has happened
unsigned long long fake_cuda_allocated(void);  // bytes of live device and managed memory
// The calls since the last fake_cuda_clear_calls, "NAME caller-path", one a line; valid until the next call of it.
const char* fake_cuda_calls(void);
void fake_cuda_clear_calls(void);

// Between the runtime and the driver: notes a call and answers the error that was injected into it, or 0.
int fake_cuda_enter(const char* call, const void* return_address);
int fake_cuda_unsupported(const char* call);

#ifdef __cplusplus
}
#endif
