// What AddressSanitizer and ThreadSanitizer must be told about fibers, in builds that have them; nothing elsewhere.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define CUDA_HOST_NO_ASAN __attribute__((no_sanitize_address))
#else
#define CUDA_HOST_NO_ASAN
#endif

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
// The scheduler's own accesses are no part of the kernel under test.
#define CUDA_HOST_RUNTIME __attribute__((noinline, no_sanitize_thread))
#else
#define CUDA_HOST_RUNTIME
#endif

namespace cuda_host {

// Hides the runtime's memory accesses (standard containers included) from ThreadSanitizer for the scope's lifetime.
struct IgnoreAccesses {
#if defined(__SANITIZE_THREAD__)
    IgnoreAccesses() {
        AnnotateIgnoreReadsBegin("", 0);
        AnnotateIgnoreWritesBegin("", 0);
    }
    ~IgnoreAccesses() {
        AnnotateIgnoreWritesEnd("", 0);
        AnnotateIgnoreReadsEnd("", 0);
    }
#else
    IgnoreAccesses() {}
    ~IgnoreAccesses() {}
#endif
    IgnoreAccesses(const IgnoreAccesses&) = delete;
    IgnoreAccesses& operator=(const IgnoreAccesses&) = delete;
};

// Happens-before edges of barriers: fibers switch without one, so ThreadSanitizer sees a race whatever the order run.
CUDA_HOST_RUNTIME inline void tsan_release([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(token);
#endif
}
CUDA_HOST_RUNTIME inline void tsan_acquire([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(token);
#endif
}

}  // namespace cuda_host
