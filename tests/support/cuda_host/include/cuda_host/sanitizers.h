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
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
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

// Arithmetic of the runtime over its own memory, in loops that are slow when each access is checked.
#define CUDA_HOST_UNCHECKED __attribute__((noinline, optimize("O3"), no_sanitize("address,undefined,thread")))

namespace cuda_host {

#if defined(__SANITIZE_THREAD__)
// Scopes that hide accesses, on the stack that runs now; each stack has a counter of its own.
inline int main_hiding = 0;
inline int* hiding = &main_hiding;
CUDA_HOST_RUNTIME inline void begin_hiding() {
    ++*hiding;
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
}
CUDA_HOST_RUNTIME inline void end_hiding() {
    --*hiding;
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
}
#else
inline void begin_hiding() {}
inline void end_hiding() {}
#endif

// Hides the runtime's memory accesses (standard containers included) from ThreadSanitizer for the scope's lifetime.
struct IgnoreAccesses {
    IgnoreAccesses() { begin_hiding(); }
    ~IgnoreAccesses() { end_hiding(); }
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

// Declares accesses by the running thread that are hidden themselves. Not in the scope of an IgnoreAccesses.
CUDA_HOST_RUNTIME inline void declare_read([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_THREAD__)
    __tsan_read_range(const_cast<void*>(address), bytes);
#endif
}
CUDA_HOST_RUNTIME inline void declare_write([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_THREAD__)
    __tsan_write_range(address, bytes);
#endif
}

struct MemoryRange {
    const void* begin;
    size_t bytes;
};

// Hardware that works beside the threads. For ThreadSanitizer, what it reads and writes is done by a thread of its own,
// which knows only what it has acquired.
class AsyncUnit {
  public:
    // Declares reads of `read` and a write of `written`, after everything that was released to `begin`, and before
    // everything that acquires `end`, where that is not null.
    CUDA_HOST_RUNTIME void declare([[maybe_unused]] void* begin, [[maybe_unused]] const MemoryRange* read,
                                   [[maybe_unused]] size_t reads, [[maybe_unused]] MemoryRange written,
                                   [[maybe_unused]] void* end) {
#if defined(__SANITIZE_THREAD__)
        if (!fiber_) fiber_ = __tsan_create_fiber(0);
        void* caller = __tsan_get_current_fiber();
        __tsan_switch_to_fiber(fiber_, 1);
        __tsan_acquire(begin);
        for (size_t i = 0; i < reads; i++) __tsan_read_range(const_cast<void*>(read[i].begin), read[i].bytes);
        if (written.bytes) __tsan_write_range(const_cast<void*>(written.begin), written.bytes);
        if (end) __tsan_release(end);
        __tsan_release(&all_token);
        __tsan_switch_to_fiber(caller, 1);
#endif
    }

    // Acquired where a block has ended: everything that any unit has done.
    static inline char all_token = 0;

  private:
    void* fiber_ = nullptr;  // lives as long as the process
};

}  // namespace cuda_host
