// TMA copies of boxes, and cuTensorMapEncodeTiled with the driver's checks.
#include "cuda_host/tensor_copy.h"

#include <algorithm>
#include <cstring>

#include "cuda_host/async_copy.h"
#include "cuda_host/async_proxy.h"
#include "cuda_host/mbarrier.h"

namespace cuda_host {
namespace {

constexpr uint32_t kDestinationAlignment = 128;

// One unit for each issuing thread: copies of different threads are not ordered by being copies.
CUDA_HOST_RUNTIME AsyncUnit& unit_of(int thread) {
    static AsyncUnit units[kMaxThreads];
    return units[thread];
}

// CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA fills with "a special NaN".
uint8_t outside_byte(const TensorMap& map) { return map.fill_nan ? 0xFF : 0; }

}  // namespace

TensorCopies& tensor_copies() {
    static TensorCopies instance;
    return instance;
}

CUDA_HOST_RUNTIME void TensorCopies::issue(void* destination, const void* map, std::initializer_list<int> coordinates,
                                           void* barrier, Where where) {
    mbarriers().check_copy_target(barrier, where);
    IgnoreAccesses ignore;
    Machine& m = machine();
    PendingTensorCopy copy{};
    memcpy(&copy.map, map, sizeof copy.map);
    const char* file = where.file_name();
    const unsigned line = where.line();
    if (copy.map.mark != TensorMap::kMark) {
        m.fail("cp.async.bulk.tensor at %s:%u: %p is no CUtensorMap of cuTensorMapEncodeTiled", file, line, map);
    }
    if (int(coordinates.size()) != copy.map.rank) {
        m.fail("cp.async.bulk.tensor at %s:%u: %zu coordinates for a map of %d dimensions", file, line,
               coordinates.size(), copy.map.rank);
    }
    const int bytes = copy.map.box_bytes();
    const int64_t address = m.shared_address(destination, size_t(bytes));
    if (address < 0) {
        m.fail("cp.async.bulk.tensor at %s:%u: the %d bytes from %p on are not all in one shared variable", file, line,
               bytes, destination);
    }
    if (address % kDestinationAlignment) {
        m.fail("cp.async.bulk.tensor at %s:%u: shared address %#lx is not 128-byte aligned", file, line,
               (unsigned long)address);
    }
    copy.destination = uint32_t(address);
    std::copy(coordinates.begin(), coordinates.end(), copy.coordinate);
    copy.barrier = barrier;
    copy.token = m.fresh_token();
    copy.thread = m.current->linear;
    copy.where = where;
    tsan_release(copy.token);
    pending_.push_back(copy);
    unit_of(copy.thread).declare(copy.token, nullptr, 0, {destination, size_t(bytes)}, nullptr);
    memset(destination, kPoison, size_t(bytes));
    async_proxy().written(copy.destination, size_t(bytes));
}

CUDA_HOST_RUNTIME bool TensorCopies::make_one(void* barrier) {
    size_t found = pending_.size();
    uint32_t seen = 0;
    for (size_t i = 0; i < pending_.size(); i++) {
        if (pending_[i].barrier == barrier && machine().random() % ++seen == 0) found = i;
    }
    if (found == pending_.size()) return false;
    const PendingTensorCopy chosen = pending_[found];
    pending_.erase(pending_.begin() + long(found));
    void* end = mbarriers().complete(barrier, uint32_t(chosen.map.box_bytes()), chosen.where);
    copy(chosen, end);
    return true;
}

// By pieces of 16 bytes, of which those at the tensor's edge are copied by elements.
CUDA_HOST_RUNTIME void TensorCopies::copy(const PendingTensorCopy& copy, void* end) {
    constexpr int kPiece = 16;
    const TensorMap& map = copy.map;
    const int bytes = map.box_bytes(), elements = kPiece / map.element_bytes, row_pieces = map.box[0] / elements;
    char* begin = machine().shared_pointer(copy.destination, size_t(bytes));
    std::vector<MemoryRange> read;
    for (int piece = 0; piece < bytes / kPiece; piece++) {
        char* to = begin + (swizzled(copy.destination + uint32_t(piece * kPiece), map.swizzle) - copy.destination);
        const int64_t column = int64_t(copy.coordinate[0]) + piece % row_pieces * elements;
        uint64_t row = map.address;
        bool inside = true;
        for (int d = 1, rest = piece / row_pieces; d < map.rank; rest /= map.box[d], d++) {
            const int64_t index = int64_t(copy.coordinate[d]) + rest % map.box[d];
            inside = inside && index >= 0 && index <= map.last[d];
            row += uint64_t(index) * map.stride_bytes[d - 1];
        }
        for (int i = 0; i < elements; i++) {
            char* element = to + i * map.element_bytes;
            if (!inside || column + i < 0 || column + i > map.last[0]) {
                memset(element, outside_byte(map), map.element_bytes);
                continue;
            }
            const auto* from = reinterpret_cast<const char*>(row) + (column + i) * map.element_bytes;
            read.push_back({from, map.element_bytes});
            memcpy(element, from, map.element_bytes);
        }
    }
    async_proxy().written(copy.destination, size_t(bytes));
    unit_of(copy.thread).declare(copy.token, read.data(), read.size(), {begin, size_t(bytes)}, end);
}

std::string TensorCopies::left_over() const {
    if (pending_.empty()) return "";
    const Where& where = pending_.front().where;
    return "the block ended while " + std::to_string(pending_.size()) + " cp.async.bulk.tensor were pending, one of " +
           where.file_name() + ":" + std::to_string(where.line());
}

}  // namespace cuda_host
