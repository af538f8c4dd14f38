// Preloaded into a process: once armed, the n-th allocation by the named libraries fails, and no other.
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <new>

namespace {

struct Range {
    uintptr_t begin, end;
};

constexpr int kMostRanges = 64;
Range ranges[kMostRanges];
std::atomic<int> n_ranges{0};
std::atomic<long> left{0};  // allocations before the failing one; 0: none fails
std::atomic<long> failed{0};

int note(struct dl_phdr_info* info, size_t, void* wanted) {
    if (!strstr(info->dlpi_name, static_cast<const char*>(wanted))) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        if (header.p_type != PT_LOAD || !(header.p_flags & PF_X) || n_ranges >= kMostRanges) continue;
        const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
        ranges[n_ranges] = {begin, begin + header.p_memsz};
        ++n_ranges;
    }
    return 0;
}

bool fails(void* caller) {
    if (left.load(std::memory_order_relaxed) <= 0) return false;
    const auto address = reinterpret_cast<uintptr_t>(caller);
    bool watched = false;
    for (int i = 0; i < n_ranges; ++i) watched |= ranges[i].begin <= address && address < ranges[i].end;
    if (!watched || left.fetch_sub(1) != 1) return false;
    ++failed;
    return true;
}

template <class Function>
Function next(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

void watch_library(const char* part_of_its_name) { dl_iterate_phdr(note, const_cast<char*>(part_of_its_name)); }

void fail_allocation(long n) { left = n; }

long failed_allocations() { return failed; }

void* malloc(size_t size) {
    static const auto real = next<void* (*)(size_t)>("malloc");
    return fails(__builtin_return_address(0)) ? nullptr : real(size);
}

void* aligned_alloc(size_t alignment, size_t size) {
    static const auto real = next<void* (*)(size_t, size_t)>("aligned_alloc");
    return fails(__builtin_return_address(0)) ? nullptr : real(alignment, size);
}

int posix_memalign(void** memory, size_t alignment, size_t size) {
    static const auto real = next<int (*)(void**, size_t, size_t)>("posix_memalign");
    return fails(__builtin_return_address(0)) ? ENOMEM : real(memory, alignment, size);
}
}

void* operator new(size_t size) {
    if (fails(__builtin_return_address(0))) throw std::bad_alloc();
    if (void* memory = malloc(size)) return memory;
    throw std::bad_alloc();
}

void operator delete(void* memory) noexcept { free(memory); }
void operator delete(void* memory, size_t) noexcept { free(memory); }
