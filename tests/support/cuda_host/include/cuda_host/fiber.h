// One stack per CUDA thread and the switch between stacks (x86-64 System V).
#pragma once

#include <sys/mman.h>

#include <cstdlib>

#include "sanitizers.h"

// Saves the callee-saved registers and the stack pointer to *save, continues at `to`. In runtime/switch.cpp.
extern "C" void cuda_host_switch(void** save, void* to);

namespace cuda_host {

struct Fiber {
    static constexpr size_t kStackBytes = 256 * 1024;
    static constexpr size_t kGuardBytes = 4096;

    void* stack_pointer = nullptr;
    char* stack = nullptr;
    void* tsan = nullptr;
    void* asan_fake_stack = nullptr;
    int hiding = 0;  // its scopes that hide accesses

    // Makes the fiber start at `entry` on its next switch. Stacks are kept for the next block; a guard page ends each.
    CUDA_HOST_RUNTIME void prepare(void (*entry)()) {
        if (!stack) {
            void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (memory == MAP_FAILED) abort();
            mprotect(memory, kGuardBytes, PROT_NONE);
            stack = static_cast<char*>(memory);
        }
#if defined(__SANITIZE_THREAD__)
        if (!tsan) tsan = __tsan_create_fiber(0);
#endif
        void** top = reinterpret_cast<void**>(stack + kGuardBytes + kStackBytes - 64);
        *--top = nullptr;  // the return address of `entry`, which never returns
        *--top = reinterpret_cast<void*>(entry);
        for (int saved_register = 0; saved_register < 6; saved_register++) *--top = nullptr;
        stack_pointer = top;
        asan_fake_stack = nullptr;
    }

    // Called from the main stack for a thread that never continues, after an error: what it did comes before everything
    // that acquires `token`. Its next life is another thread for ThreadSanitizer, with a clean stack for
    // AddressSanitizer.
    CUDA_HOST_RUNTIME void abandon([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
        void* caller = __tsan_get_current_fiber();
        __tsan_switch_to_fiber(tsan, 1);
        cuda_host::hiding = &hiding;
        while (hiding) end_hiding();
        cuda_host::hiding = &main_hiding;
        __tsan_release(token);
        __tsan_switch_to_fiber(caller, 1);
        __tsan_destroy_fiber(tsan);
        tsan = nullptr;
#elif defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(stack + kGuardBytes, kStackBytes);
#endif
    }
};

// The stack of the caller of a launch, to which every fiber switches back.
struct MainStack {
    void* stack_pointer = nullptr;
    void* tsan = nullptr;
    void* asan_fake_stack = nullptr;
    const void* bottom = nullptr;
    size_t bytes = 0;
};

CUDA_HOST_RUNTIME inline void switch_to_fiber(MainStack& main, Fiber& fiber, [[maybe_unused]] bool running) {
#if defined(__SANITIZE_THREAD__)
    // The first switch of a block hands over what the launcher wrote before it; later ones order nothing.
    __tsan_switch_to_fiber(fiber.tsan, running ? 1 : 0);
    hiding = &fiber.hiding;
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&main.asan_fake_stack, fiber.stack + Fiber::kGuardBytes, Fiber::kStackBytes);
#endif
    cuda_host_switch(&main.stack_pointer, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(main.asan_fake_stack, nullptr, nullptr);
#endif
}

CUDA_HOST_RUNTIME inline void switch_to_main(MainStack& main, Fiber& fiber, [[maybe_unused]] bool finished) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(main.tsan, 1);
    hiding = &main_hiding;
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(finished ? nullptr : &fiber.asan_fake_stack, main.bottom, main.bytes);
#endif
    cuda_host_switch(&fiber.stack_pointer, main.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.asan_fake_stack, nullptr, nullptr);
#endif
}

}  // namespace cuda_host
