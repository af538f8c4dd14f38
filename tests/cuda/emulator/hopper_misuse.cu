// Uses of mbarriers that are undefined on a GPU, or never end, each of which the emulator reports; and the order of
// memory that they give, for ThreadSanitizer.
#include "qlora/launch.cuh"
#include "qlora/ptx_sm90.cuh"
#include "qlora/shared_memory.cuh"

namespace misuse {

using namespace qlora::ptx;

struct Barriers {
    uint64_t barrier, other;
};

// By `which`: 0 an arrival at a misaligned address, 1 at one outside shared memory, 2 before initialization, 3 one too
// many, 4 a second initialization, 5 a barrier whose memory was overwritten, 6 a wait that nobody ends, 7 a block that
// ends with a wgmma of one warp, 8 more bytes than a barrier counts, 9 no arrivals at all.
__global__ void misuse_kernel(int which, uint64_t* in_global) {
    Barriers& shared = qlora::dynamic_shared<Barriers>();
    const int thread = threadIdx.x;
    if (thread == 0) {
        barrier_init(&shared.barrier, which == 9 ? 0 : 2);
        if (which == 4) barrier_init(&shared.barrier, 2);
        if (which == 5) shared.barrier = 0;
    }
    __syncthreads();
    if (which == 7 && thread < 32) {
        float sum[32];
        const uint32_t word = *reinterpret_cast<const volatile uint32_t*>(in_global), a[4] = {word, word, word, word};
        wgmma_fence();
        wgmma_m64k16<__half, 64>(sum, a, tile_descriptor(&shared), false);
        wgmma_commit();
        wgmma_wait<0>();
    }
    if (thread != 0) return;
    if (which == 0) barrier_arrive(reinterpret_cast<uint64_t*>(reinterpret_cast<char*>(&shared.barrier) + 4));
    if (which == 1) barrier_arrive(in_global);
    if (which == 2) barrier_arrive(&shared.other);
    for (int i = 0; which == 3 && i < 3; i++) barrier_arrive_expecting(&shared.barrier, 16);
    if (which == 8) barrier_arrive_expecting(&shared.barrier, 1 << 20);
    barrier_arrive(&shared.barrier);
    if (which == 6) barrier_wait(&shared.barrier, 0);
    barrier_arrive(&shared.barrier);
    barrier_wait(&shared.barrier, 0);
}

// Thread 0 hands a word in shared memory to thread 32, which returns it. By `which`: 0 it arrives after the write,
// which is right; 1 before the write; 2 after it, but in the phase after the one that thread 32 waits for.
__global__ void order_kernel(int which, uint32_t* y) {
    struct Words : Barriers {
        uint32_t word;
    };
    Words& shared = qlora::dynamic_shared<Words>();
    const int thread = threadIdx.x;
    if (thread == 0) {
        barrier_init(&shared.barrier, which == 2 ? 2 : 1);
        shared.word = 1;
    }
    __syncthreads();
    if (thread == 0) {
        for (int i = 0; i < which; i++) barrier_arrive(&shared.barrier);
        shared.word = 2;
        if (which != 1) barrier_arrive(&shared.barrier);
    }
    if (thread == 32) {
        barrier_wait(&shared.barrier, 0);
        y[0] = shared.word;
    }
}

}  // namespace misuse

extern "C" cudaError_t launch_order(int which, uint32_t* y) {
    return qlora::launch({1, 64, 64}, misuse::order_kernel, which, y);
}

extern "C" cudaError_t launch_misuse(int which, uint64_t* in_global) {
    return qlora::launch({1, 128, sizeof(misuse::Barriers)}, misuse::misuse_kernel, which, in_global);
}
