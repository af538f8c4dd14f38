// Collectives: every lane of a mask brings a value, the last to arrive computes what each receives.
#pragma once

#include <cstring>

#include "machine.h"

namespace cuda_host {

constexpr uint32_t kFullWarp = 0xFFFFFFFFu;

// `compute(inputs, outputs, mask)` runs once, over the lanes of `mask`. `orders_memory`: as __syncwarp does.
// Errors: a lane outside its own mask; lanes of one mask that meet in different operations; a lane that never comes
// (reported as a deadlock by the scheduler).
template <class Output, class Input, class Compute>
CUDA_HOST_RUNTIME Output collective(const char* operation, uint32_t mask, const Input& input, Compute compute,
                                    Where where, bool orders_memory = false) {
    static_assert(sizeof(Input) <= Warp::kSlotBytes && sizeof(Output) <= Warp::kSlotBytes);
    IgnoreAccesses ignore;
    Machine& m = machine();
    Thread& self = *m.current;
    Warp& warp = m.warp_of(self);
    const uint32_t me = 1u << self.lane;
    if (!(mask & me)) {
        m.fail("%s: lane %d is not in its own mask %08x (%s:%u)", operation, self.lane, mask, where.file_name(),
               where.line());
    }
    Meeting* meeting = nullptr;
    for (Meeting& candidate : warp.meetings) {
        if (candidate.arrived && candidate.mask == mask) meeting = &candidate;
    }
    for (Meeting& candidate : warp.meetings) {
        if (!meeting && !candidate.arrived) meeting = &candidate;
    }
    if (meeting->arrived && strcmp(meeting->operation, operation) != 0) {
        m.fail("%s at %s:%u meets %s in the same warp", operation, where.file_name(), where.line(), meeting->operation);
    }
    meeting->mask = mask;
    meeting->operation = operation;
    meeting->arrived |= me;
    __builtin_memcpy(warp.input[self.lane], &input, sizeof(Input));
    if (orders_memory) tsan_release(m.warp_token(self.warp));
    if (meeting->arrived == mask) {
        Input inputs[kWarpLanes];
        Output outputs[kWarpLanes];
        for (int l = 0; l < kWarpLanes; l++) {
            if (mask >> l & 1) __builtin_memcpy(&inputs[l], warp.input[l], sizeof(Input));
        }
        compute(inputs, outputs, mask);
        meeting->arrived = 0;
        for (int l = 0; l < kWarpLanes; l++) {
            if (!(mask >> l & 1)) continue;
            __builtin_memcpy(warp.output[l], &outputs[l], sizeof(Output));
            if (l != self.lane) m.wake(m.lane_of_current_warp(l));
        }
        if (m.random() & 1) m.yield();
    } else {
        m.wait_in_collective(operation, where);
    }
    if (orders_memory) tsan_acquire(m.warp_token(self.warp));
    Output result;
    __builtin_memcpy(&result, warp.output[self.lane], sizeof(Output));
    return result;
}

// Each lane receives the value of the lane it names. Reading a lane outside the mask is undefined on a GPU: an error.
template <class T>
T shuffle(const char* operation, uint32_t mask, T value, int source_lane, Where where) {
    struct Input {
        T value;
        int source;
    };
    return collective<T>(
        operation, mask, Input{value, source_lane},
        [operation](const Input* inputs, T* outputs, uint32_t lanes) {
            for (int l = 0; l < kWarpLanes; l++) {
                if (!(lanes >> l & 1)) continue;
                const int source = inputs[l].source;
                if (!(lanes >> source & 1)) {
                    machine().fail("%s: lane %d reads lane %d, which is not in mask %08x", operation, l, source, lanes);
                }
                outputs[l] = inputs[source].value;
            }
        },
        where);
}

// Every lane receives reduce(values, mask), a value of all of them.
template <class Output, class Input, class Reduce>
Output agree(const char* operation, uint32_t mask, Input value, Reduce reduce, Where where) {
    return collective<Output>(
        operation, mask, value,
        [reduce](const Input* inputs, Output* outputs, uint32_t lanes) {
            const Output result = reduce(inputs, lanes);
            for (int l = 0; l < kWarpLanes; l++) {
                if (lanes >> l & 1) outputs[l] = result;
            }
        },
        where);
}

inline uint32_t ballot(uint32_t mask, int predicate, Where where) {
    return agree<uint32_t>(
        "__ballot_sync", mask, predicate,
        [](const int* inputs, uint32_t lanes) {
            uint32_t bits = 0;
            for (int l = 0; l < kWarpLanes; l++) bits |= uint32_t((lanes >> l & 1) && inputs[l] != 0) << l;
            return bits;
        },
        where);
}

template <class T, class Combine>
T reduce_warp(const char* operation, uint32_t mask, T value, Combine combine, Where where) {
    return agree<T>(
        operation, mask, value,
        [combine](const T* inputs, uint32_t lanes) {
            int first = 0;
            while (!(lanes >> first & 1)) first++;
            T result = inputs[first];
            for (int l = first + 1; l < kWarpLanes; l++) {
                if (lanes >> l & 1) result = combine(result, inputs[l]);
            }
            return result;
        },
        where);
}

}  // namespace cuda_host

inline void __syncthreads(cuda_host::Where where = cuda_host::Where::current()) {
    cuda_host::machine().barrier(0, "__syncthreads", where);
}
inline int __syncthreads_or(int predicate, cuda_host::Where where = cuda_host::Where::current()) {
    return cuda_host::machine().barrier(predicate, "__syncthreads_or", where) & 1;
}
inline int __syncthreads_and(int predicate, cuda_host::Where where = cuda_host::Where::current()) {
    return cuda_host::machine().barrier(predicate, "__syncthreads_and", where) >> 1 & 1;
}
inline int __syncthreads_count(int predicate, cuda_host::Where where = cuda_host::Where::current()) {
    return cuda_host::machine().barrier(predicate, "__syncthreads_count", where) >> 2;
}
inline void __syncwarp(unsigned mask = cuda_host::kFullWarp, cuda_host::Where where = cuda_host::Where::current()) {
    cuda_host::collective<int>(
        "__syncwarp", mask, 0, [](const int*, int* outputs, uint32_t) { memset(outputs, 0, sizeof(int) * 32); }, where,
        true);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              cuda_host::Where where = cuda_host::Where::current()) {
    return cuda_host::shuffle("__shfl_sync", mask, value, (cuda_host::lane() & ~(width - 1)) | (source & (width - 1)),
                              where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  cuda_host::Where where = cuda_host::Where::current()) {
    const int self = cuda_host::lane(), source = self ^ lane_mask;
    const bool later_group = (source & ~(width - 1)) > (self | (width - 1));
    return cuda_host::shuffle("__shfl_xor_sync", mask, value, later_group ? self : source, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cuda_host::Where where = cuda_host::Where::current()) {
    const int self = cuda_host::lane();
    const bool inside = (self & (width - 1)) + int(delta) < width;
    return cuda_host::shuffle("__shfl_down_sync", mask, value, inside ? self + int(delta) : self, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 cuda_host::Where where = cuda_host::Where::current()) {
    const int self = cuda_host::lane();
    const bool inside = (self & (width - 1)) >= int(delta);
    return cuda_host::shuffle("__shfl_up_sync", mask, value, inside ? self - int(delta) : self, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_host::Where where = cuda_host::Where::current()) {
    return cuda_host::ballot(mask, predicate, where);
}
inline int __any_sync(unsigned mask, int predicate, cuda_host::Where where = cuda_host::Where::current()) {
    return cuda_host::ballot(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cuda_host::Where where = cuda_host::Where::current()) {
    return cuda_host::ballot(mask, predicate, where) == mask;
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, cuda_host::Where where = cuda_host::Where::current()) {
    return cuda_host::reduce_warp("__reduce_max_sync", mask, value, [](T a, T b) { return a > b ? a : b; }, where);
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, cuda_host::Where where = cuda_host::Where::current()) {
    return cuda_host::reduce_warp("__reduce_add_sync", mask, value, [](T a, T b) { return a + b; }, where);
}
