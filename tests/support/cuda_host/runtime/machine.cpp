// The scheduler: which thread runs next, what a barrier waits for, and what is reported when nothing can run.
#include "cuda_host/machine.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>

#include "cuda_host/async_copy.h"
#include "cuda_host/async_proxy.h"
#include "cuda_host/banks.h"
#include "cuda_host/mbarrier.h"
#include "cuda_host/qualifiers.h"
#include "cuda_host/tensor_copy.h"
#include "cuda_host/warpgroup.h"

// Bounds of every __shared__ variable of the library; absent where there is none.
extern char __start_cuda_host_shared[] __attribute__((visibility("hidden"), weak));
extern char __stop_cuda_host_shared[] __attribute__((visibility("hidden"), weak));

namespace cuda_host {
namespace {

CUDA_HOST_NO_ASAN CUDA_HOST_RUNTIME void poison_static_shared() {
    for (volatile char* byte = __start_cuda_host_shared; byte < __stop_cuda_host_shared; byte++) *byte = char(kPoison);
}

void* poisoned_block(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kSharedAlignment, bytes)) abort();
    memset(memory, kPoison, bytes);
    return memory;
}

std::string at(const Where& where) { return std::string(where.file_name()) + ":" + std::to_string(where.line()); }

}  // namespace

Machine& machine() {
    static Machine instance;
    return instance;
}

CUDA_HOST_RUNTIME uint32_t Machine::random() {
    random_state_ ^= random_state_ << 13;
    random_state_ ^= random_state_ >> 7;
    random_state_ ^= random_state_ << 17;
    return uint32_t(random_state_ >> 16);
}

CUDA_HOST_RUNTIME void Machine::fail(const char* format, ...) {
    char text[600], place[160];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    const uint3& t = current->index;
    snprintf(place, sizeof place, "block (%u,%u,%u) thread (%u,%u,%u): ", block_index.x, block_index.y, block_index.z,
             t.x, t.y, t.z);
    error = std::string(place) + text;
    for (;;) switch_to_main(main_, current->fiber, false);
}

CUDA_HOST_RUNTIME void Machine::suspend(Status status, const char* name, Where where) {
    current->status = status;
    current->waiting_in = name;
    current->waiting_at = where;
    switch_to_main(main_, current->fiber, false);
}

CUDA_HOST_RUNTIME void Machine::wait_in_collective(const char* operation, Where where) {
    suspend(Status::kAtCollective, operation, where);
}

CUDA_HOST_RUNTIME void Machine::wake(Thread& thread) {
    thread.status = Status::kReady;
    ready_.push_back(thread.linear);
}

CUDA_HOST_RUNTIME void Machine::yield() {
    wake(*current);
    switch_to_main(main_, current->fiber, false);
}

CUDA_HOST_RUNTIME int Machine::barrier(int predicate, const char* name, Where where) {
    IgnoreAccesses ignore;
    Thread& self = *current;
    self.barrier_predicate = predicate;
    at_barrier_++;
    tsan_release(block_token());
    suspend(Status::kAtBarrier, name, where);
    tsan_acquire(block_token());
    return self.barrier_result;
}

// Called when every thread that is still alive has arrived; exited threads count as arrived, as on sm_70 and later.
CUDA_HOST_RUNTIME void Machine::release_barrier() {
    const Thread* first = nullptr;
    int count = 0;
    for (int i = 0; i < thread_count_; i++) {
        const Thread& thread = threads_[i];
        if (thread.status != Status::kAtBarrier) continue;
        count += thread.barrier_predicate != 0;
        if (!first) first = &thread;
        // Which barrier instruction a thread stands at is not checked by a GPU, but meeting at different ones is a bug.
        if (thread.waiting_at.line() != first->waiting_at.line() ||
            strcmp(thread.waiting_at.file_name(), first->waiting_at.file_name()) != 0) {
            error = "barrier divergence: thread " + std::to_string(first->linear) + " waits at " +
                    at(first->waiting_at) + ", thread " + std::to_string(i) + " at " + at(thread.waiting_at);
            return;
        }
    }
    const int result = (count > 0 ? 1 : 0) | (count == at_barrier_ ? 2 : 0) | count << 2;
    for (int i = 0; i < thread_count_; i++) {
        if (threads_[i].status != Status::kAtBarrier) continue;
        threads_[i].barrier_result = result;
        wake(threads_[i]);
    }
    at_barrier_ = 0;
}

CUDA_HOST_RUNTIME std::string Machine::describe_deadlock() const {
    constexpr size_t kShownThreads = 3;
    std::map<std::string, std::vector<int>> threads_at;
    for (int i = 0; i < thread_count_; i++) {
        const Thread& thread = threads_[i];
        if (thread.status != Status::kAtCollective && thread.status != Status::kAtBarrier) continue;
        threads_at[std::string(thread.waiting_in) + " at " + at(thread.waiting_at)].push_back(i);
    }
    std::string text = "deadlock:";
    for (const auto& [place, threads] : threads_at) {
        text += threads.size() == 1 ? " [thread" : " [threads";
        for (size_t i = 0; i < std::min(threads.size(), kShownThreads); i++) text += " " + std::to_string(threads[i]);
        if (threads.size() > kShownThreads) text += " and " + std::to_string(threads.size() - kShownThreads) + " more";
        text += " in " + place + "]";
    }
    return text + " alive " + std::to_string(alive_) + " of " + std::to_string(thread_count_) + ", at a barrier " +
           std::to_string(at_barrier_) + mbarriers().describe();
}

CUDA_HOST_RUNTIME void* Machine::block_shared(const void* key, size_t bytes) {
    IgnoreAccesses ignore;
    uint32_t end = uint32_t(dynamic_shared_bytes);
    for (const BlockShared& shared : block_shared_) {
        if (shared.key == key) return shared.memory;
        end = uint32_t(shared.address + shared.bytes);
    }
    const uint32_t address = (end + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    block_shared_.push_back({key, static_cast<char*>(poisoned_block(bytes)), bytes, address});
    return block_shared_.back().memory;
}

CUDA_HOST_RUNTIME int64_t Machine::shared_address(const void* pointer, size_t bytes) const {
    const char* begin = static_cast<const char*>(pointer);
    auto inside = [&](const char* memory, size_t size) { return begin >= memory && begin + bytes <= memory + size; };
    if (inside(dynamic_shared, dynamic_shared_bytes)) return begin - dynamic_shared;
    for (const BlockShared& shared : block_shared_) {
        if (inside(shared.memory, shared.bytes)) return shared.address + (begin - shared.memory);
    }
    const size_t variables = size_t(__stop_cuda_host_shared - __start_cuda_host_shared);
    if (inside(__start_cuda_host_shared, variables)) return kDescriptorBytes + (begin - __start_cuda_host_shared);
    return -1;
}

CUDA_HOST_RUNTIME char* Machine::shared_pointer(uint32_t address, size_t bytes) const {
    if (address + bytes <= dynamic_shared_bytes) return dynamic_shared + address;
    for (const BlockShared& shared : block_shared_) {
        if (address >= shared.address && address + bytes <= shared.address + shared.bytes) {
            return shared.memory + (address - shared.address);
        }
    }
    return nullptr;
}

CUDA_HOST_RUNTIME void Machine::thread_main() {
    Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &m.main_.bottom, &m.main_.bytes);
#endif
    m.body_(m.argument_);
    tsan_release(&m.grid_token_);
    m.current->status = Status::kDone;
    m.alive_--;
    switch_to_main(m.main_, m.current->fiber, true);
    __builtin_trap();
}

CUDA_HOST_RUNTIME void Machine::prepare_block(void (*entry)()) {
    block_serial_++;
    const int warp_count = (thread_count_ + kWarpLanes - 1) / kWarpLanes;
    warps_.resize(warp_count);
    for (Warp& warp : warps_) {
        for (Meeting& meeting : warp.meetings) meeting.arrived = 0;
    }
    alive_ = thread_count_;
    at_barrier_ = 0;
    async_proxy().start_block();
    mbarriers().start_block();
    tensor_copies().start_block();
    warpgroups().start_block(thread_count_);
    ready_.clear();
    if (dynamic_shared_bytes) dynamic_shared = static_cast<char*>(poisoned_block(dynamic_shared_bytes));
    poison_static_shared();
    for (int i = 0; i < thread_count_; i++) {
        Thread& thread = threads_[i];
        thread.linear = i;
        thread.lane = i % kWarpLanes;
        thread.warp = i / kWarpLanes;
        thread.status = Status::kReady;
        thread.copies.clear();
        thread.copy_group = 0;
        thread.index = {unsigned(i % block_size.x), unsigned(i / block_size.x % block_size.y),
                        unsigned(i / (block_size.x * block_size.y))};
        thread.fiber.prepare(entry);
        ready_.push_back(i);
    }
    // Uniform choice keeps warps close together. Random warp priorities with now and then a change let one warp run far
    // ahead, which is what a missing barrier between pipeline stages needs to show: half of the blocks get them.
    warp_priority_.clear();
    if (order == Order::kWarpPriority || (order == Order::kRandom && warp_count > 1 && (random() & 1))) {
        for (int i = 0; i < warp_count; i++) warp_priority_.push_back(random());
    }
}

CUDA_HOST_RUNTIME size_t Machine::pick() {
    if (order == Order::kForward) return 0;
    if (order == Order::kReverse) return ready_.size() - 1;
    size_t choice = random() % ready_.size();
    if (warp_priority_.empty()) return choice;
    if (random() % 512 == 0) warp_priority_[random() % warp_priority_.size()] = random();
    for (size_t i = 0; i < ready_.size(); i++) {
        if (warp_priority_[ready_[i] / kWarpLanes] > warp_priority_[ready_[choice] / kWarpLanes]) choice = i;
    }
    return choice;
}

CUDA_HOST_RUNTIME Thread& Machine::take(size_t position) {
    const int thread = ready_[position];
    if (order == Order::kForward) {
        ready_.erase(ready_.begin());
    } else {
        ready_[position] = ready_.back();
        ready_.pop_back();
    }
    return threads_[thread];
}

CUDA_HOST_RUNTIME void Machine::run_block(void (*entry)()) {
    prepare_block(entry);
    std::vector<bool> started(thread_count_);
    while (alive_ && error.empty()) {
        if (ready_.empty()) {
            if (at_barrier_ == alive_) {
                release_barrier();
            } else {
                error = describe_deadlock();
            }
            continue;
        }
        Thread& next = take(pick());
        current = &next;
        switch_to_fiber(main_, next.fiber, started[next.linear]);
        started[next.linear] = true;
    }
    if (error.empty()) error = tensor_copies().left_over();
    // Blocks are ordered, so that shared memory which the next block reuses is no race; races between blocks are not
    // seen.
    for (int i = 0; i < thread_count_; i++) {
        if (threads_[i].status != Status::kDone) threads_[i].fiber.abandon(&grid_token_);
    }
    tsan_acquire(&grid_token_);
    tsan_acquire(&AsyncUnit::all_token);
    if (bank_counter().enabled) bank_counter().finish_block();
    free(dynamic_shared);
    dynamic_shared = nullptr;
    for (const BlockShared& shared : block_shared_) free(shared.memory);
    block_shared_.clear();
}

CUDA_HOST_RUNTIME void Machine::run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                                         void* argument) {
    IgnoreAccesses ignore;
    thread_count_ = int(block.x * block.y * block.z);
    block_size = block;
    grid_size = grid;
    dynamic_shared_bytes = shared_bytes;
    body_ = body;
    argument_ = argument;
    error.clear();
    if (int(threads_.size()) < thread_count_) threads_.resize(thread_count_);
    random_state_ = seed * 0x9E3779B97F4A7C15ull | 1;
#if defined(__SANITIZE_THREAD__)
    main_.tsan = __tsan_get_current_fiber();
#endif
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    std::vector<uint64_t> sequence(blocks);
    for (uint64_t b = 0; b < blocks; b++) {
        sequence[b] = order == Order::kReverse ? blocks - 1 - b : b;
        if (order != Order::kForward && order != Order::kReverse) std::swap(sequence[b], sequence[random() % (b + 1)]);
    }
    for (uint64_t b = 0; b < blocks && error.empty(); b++) {
        const uint64_t index = sequence[b];
        block_index = {unsigned(index % grid.x), unsigned(index / grid.x % grid.y),
                       unsigned(index / (uint64_t(grid.x) * grid.y))};
        run_block(thread_main);
    }
    current = nullptr;
}

}  // namespace cuda_host
