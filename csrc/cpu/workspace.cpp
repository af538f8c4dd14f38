#include "qlora/workspace.h"

#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace qlora {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct Buffer {
    void* data = nullptr;
    size_t size = 0;

    ~Buffer() { std::free(data); }

    void grow(size_t bytes) {
        const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
        const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
        std::free(data);
        size = 0;
        data = std::aligned_alloc(alignment, rounded);
        if (!data) throw std::bad_alloc();
        size = rounded;
#ifdef __linux__
        // A hint for huge pages: the strides of panels would otherwise miss the L1 TLB on every row.
        if (alignment == kHugePage) madvise(data, rounded, MADV_HUGEPAGE);
#endif
    }
};

thread_local Buffer buffers[static_cast<int>(Slot::kCount)];

}  // namespace

void* workspace(Slot slot, size_t bytes) {
    Buffer& buffer = buffers[static_cast<int>(slot)];
    if (buffer.size < bytes) buffer.grow(bytes);
    return buffer.data;
}

}  // namespace qlora
