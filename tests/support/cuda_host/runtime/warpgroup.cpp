// Products of warpgroups: which registers wait for which product, and the product itself.
#include "cuda_host/warpgroup.h"

#include <bit>
#include <cstring>
#include <map>

#include "cuda_host/matrix_descriptor.h"
#include "cuda_host/number_formats.h"

namespace cuda_host {

constexpr int kRows = 64, kDepth = kWgmmaDepth, kMaxColumns = 256;

// One wgmma of a warpgroup.
struct WgmmaProduct {
    WgmmaShape shape;
    Where where;
    uint64_t serial = 0;
    int issued = 0;  // by so many threads
    bool done = false;
    uint32_t a[kWarpgroupThreads][4];
    std::vector<float> sums;  // of each thread n / 2: first what they were at issue, then the result
    std::vector<std::shared_ptr<WgmmaProduct>> inputs;  // products that were pending in the sums at issue
    std::vector<uint16_t> a_in_shared, b;               // the operands in shared memory as they were at issue
    void *token = nullptr, *done_token = nullptr;
};

namespace {

// Sum `index` of a pending product is a signaling NaN of which the lower 22 bits name both: arithmetic makes it quiet.
constexpr uint32_t kTag = 0x7F800000, kTagMask = 0xFFC00000;
uint32_t tag_of(uint64_t serial, int index) { return kTag | uint32_t(1 + serial % 0x7FFE) << 7 | uint32_t(index); }
bool is_tag(uint32_t bits) { return (bits & kTagMask) == kTag && (bits & ~kTagMask) >= 128; }

void read_operands(const WgmmaProduct& product, std::vector<uint16_t>& a, std::vector<uint16_t>& b,
                   std::vector<MemoryRange>& read) {
    const WgmmaShape& shape = product.shape;
    b.resize(size_t(shape.n * kDepth));
    read_matrix(shape.b, shape.n, shape.b_mn_major, product.where, b.data(), read);
    if (!shape.a_in_shared) return;
    a.resize(kRows * kDepth);
    read_matrix(shape.a, kRows, shape.a_mn_major, product.where, a.data(), read);
}

// sums [64, n] += a [64, 16] b [n, 16]^T in order of k; a GPU's order is its own.
CUDA_HOST_UNCHECKED void multiply(const float* a, const float* b_transposed, float* sums, int n) {
    for (int m = 0; m < kRows; m++) {
        float* row = sums + m * n;
        for (int k = 0; k < kDepth; k++) {
            const float factor = a[m * kDepth + k];
            const float* b = b_transposed + k * n;
            for (int j = 0; j < n; j++) row[j] += factor * b[j];
        }
    }
}

CUDA_HOST_UNCHECKED float to_float(uint16_t bits, Element16 element, bool negate) {
    const float value = element == Element16::kBf16 ? bf16_to_float(bits) : fp16_to_float(bits);
    return negate ? -value : value;
}

// Row and column of sum `index` of a thread.
int row_of(int thread, int index) { return thread / 32 * 16 + thread % 32 / 4 + (index >> 1 & 1) * 8; }
int column_of(int thread, int index) { return index / 4 * 8 + thread % 4 * 2 + (index & 1); }

CUDA_HOST_UNCHECKED void unpack_a(const WgmmaProduct& product, float* a) {
    const WgmmaShape& shape = product.shape;
    for (int i = 0; shape.a_in_shared && i < kRows * kDepth; i++) {
        a[i] = to_float(product.a_in_shared[size_t(i)], shape.element, shape.negate_a);
    }
    for (int t = 0; !shape.a_in_shared && t < kWarpgroupThreads; t++) {
        for (int i = 0; i < 8; i++) {  // two elements a register: as mma.m16n8k16
            const int word = i / 2, row = row_of(t, (word & 1) * 2), k = t % 4 * 2 + (i & 1) + (word >> 1) * 8;
            a[row * kDepth + k] = to_float(uint16_t(product.a[t][word] >> 16 * (i & 1)), shape.element, shape.negate_a);
        }
    }
}

CUDA_HOST_UNCHECKED void compute(WgmmaProduct& product) {
    static float a[kRows * kDepth], b[kMaxColumns * kDepth], sums[kRows * kMaxColumns];
    const WgmmaShape& shape = product.shape;
    const int n = shape.n, each = n / 2;
    unpack_a(product, a);
    for (int i = 0; i < n * kDepth; i++) {
        b[i % kDepth * n + i / kDepth] = to_float(product.b[size_t(i)], shape.element, shape.negate_b);
    }
    for (int i = 0; i < kWarpgroupThreads * each; i++) {
        const int t = i / each, index = i % each;
        sums[row_of(t, index) * n + column_of(t, index)] = product.sums[size_t(i)];
    }
    multiply(a, b, sums, n);
    for (int i = 0; i < kWarpgroupThreads * each; i++) {
        const int t = i / each, index = i % each;
        product.sums[size_t(i)] = sums[row_of(t, index) * n + column_of(t, index)];
    }
}

// Sums that waited for another product get its result.
void take_inputs(WgmmaProduct& product) {
    const size_t each = size_t(product.shape.n) / 2;
    for (size_t i = 0; i < product.sums.size() && !product.inputs.empty(); i++) {
        const uint32_t bits = std::bit_cast<uint32_t>(product.sums[i]);
        if (!is_tag(bits)) continue;
        for (const auto& input : product.inputs) {
            const size_t index = bits & 127, input_each = size_t(input->shape.n) / 2;
            if (bits != tag_of(input->serial, int(index))) continue;
            product.sums[i] = input->sums[i / each * input_each + index];
        }
    }
    product.inputs.clear();
}

}  // namespace

struct Warpgroups::Member {
    struct Pending {
        std::shared_ptr<WgmmaProduct> product;
        std::vector<uint32_t*> sums, a;  // a only where its registers are known
        int group;
    };
    uint64_t issued = 0;
    std::vector<Pending> pending;
    int group = 0;
    bool fenced = false;

    // The oldest product of which a wait for all but `groups` groups needs the result, or null.
    Pending* due(int groups) {
        return !pending.empty() && pending.front().group < group - groups ? &pending.front() : nullptr;
    }
};

struct Warpgroups::Group {
    Member members[kWarpgroupThreads];
    std::map<uint64_t, std::shared_ptr<WgmmaProduct>> partly_issued;
    std::vector<Thread*> waiting;
    AsyncUnit* unit = nullptr;
};

Warpgroups::Warpgroups() = default;
Warpgroups::~Warpgroups() = default;

Warpgroups& warpgroups() {
    static Warpgroups instance;
    return instance;
}

void Warpgroups::start_block(int threads) {
    static AsyncUnit units[kMaxThreads / kWarpgroupThreads];
    groups_.clear();
    for (int i = 0; i < threads / kWarpgroupThreads; i++) {
        groups_.push_back(std::make_unique<Group>());
        groups_.back()->unit = &units[i];
    }
}

Warpgroups::Group& Warpgroups::group() {
    const size_t index = size_t(machine().current->linear) / kWarpgroupThreads;
    if (index >= groups_.size())
        machine().fail("wgmma: a warpgroup of 128 threads must execute it, the last has fewer");
    return *groups_[index];
}

Warpgroups::Member& Warpgroups::member() { return group().members[machine().current->linear % kWarpgroupThreads]; }

void Warpgroups::fence() {
    IgnoreAccesses ignore;
    member().fenced = true;
}

void Warpgroups::commit() {
    IgnoreAccesses ignore;
    member().group++;
}

void Warpgroups::issue(const WgmmaShape& shape, const uint32_t* a, uint32_t* const* sums, Where where) {
    IgnoreAccesses ignore;
    Group& own_group = group();
    Member& self = member();
    const char* file = where.file_name();
    const unsigned line = where.line();
    const int thread = machine().current->linear % kWarpgroupThreads, each = shape.n / 2;
    if (!self.fenced) {
        machine().fail("wgmma at %s:%u: wgmma.fence is missing before the first wgmma, or after the last wait_group",
                       file, line);
    }
    const uint64_t serial = self.issued++;
    std::shared_ptr<WgmmaProduct>& product = own_group.partly_issued[serial];
    if (!product) {
        product = std::make_shared<WgmmaProduct>();
        product->shape = shape, product->where = where, product->serial = serial;
        product->sums.resize(size_t(kWarpgroupThreads * each));
    }
    if (!(product->shape == shape) || product->where.line() != line) {
        machine().fail("wgmma at %s:%u meets another wgmma or other operands at line %u in the same warpgroup", file,
                       line, product->where.line());
    }
    if (a) memcpy(product->a[thread], a, sizeof product->a[thread]);
    Member::Pending pending{product, {sums, sums + each}, {}, self.group};
    for (int i = 0; i < each; i++) {
        const uint32_t bits = *sums[i];
        float& input = product->sums[size_t(thread * each + i)];
        input = shape.accumulate ? std::bit_cast<float>(bits) : 0.0f;
        *sums[i] = tag_of(serial, i);
        if (!shape.accumulate || !is_tag(bits)) continue;
        for (const Member::Pending& earlier : self.pending) {
            if (bits != tag_of(earlier.product->serial, int(bits & 127))) continue;
            if (product->inputs.empty() || product->inputs.back() != earlier.product) {
                product->inputs.push_back(earlier.product);
            }
        }
    }
    self.pending.push_back(std::move(pending));
    if (++product->issued < kWarpgroupThreads) return;
    const std::shared_ptr<WgmmaProduct> complete = product;
    own_group.partly_issued.erase(serial);
    record_operands(*complete);
    for (Thread* waiting : own_group.waiting) machine().wake(*waiting);
    own_group.waiting.clear();
}

void Warpgroups::issue_registers(const WgmmaShape& shape, uint32_t* const* a, uint32_t* const* sums, Where where) {
    IgnoreAccesses ignore;
    uint32_t words[4] = {};
    for (int i = 0; a && i < 4; i++) words[i] = *a[i];
    issue(shape, a ? words : nullptr, sums, where);
    if (a) member().pending.back().a.assign(a, a + 4);
}

// What the operands in shared memory are when the last thread has issued the product.
void Warpgroups::record_operands(WgmmaProduct& product) {
    product.token = machine().fresh_token();
    product.done_token = machine().fresh_token();
    tsan_release(product.token);
    std::vector<MemoryRange> read;
    read_operands(product, product.a_in_shared, product.b, read);
    check_visible(read, product.where);
}

CUDA_HOST_RUNTIME void Warpgroups::complete_product(WgmmaProduct& product) {
    if (product.done) return;
    product.done = true;
    for (const auto& input : product.inputs) complete_product(*input);
    std::vector<uint16_t> a, b;
    std::vector<MemoryRange> read;
    read_operands(product, a, b, read);
    group().unit->declare(product.token, read.data(), read.size(), {}, product.done_token);
    if (a != product.a_in_shared || b != product.b) {
        machine().fail("wgmma at %s:%u: its operand in shared memory changed between its issue and its wait_group",
                       product.where.file_name(), product.where.line());
    }
    take_inputs(product);
    compute(product);
}

void Warpgroups::missing_fence(Where where) {
    machine().fail("wgmma at %s:%u: wgmma.fence is missing between a write of its registers and it", where.file_name(),
                   where.line());
}

void Warpgroups::wait(int groups, Where where) {
    IgnoreAccesses ignore;
    Member& self = member();
    const size_t thread = size_t(machine().current->linear % kWarpgroupThreads);
    while (Member::Pending* due = self.due(groups)) {
        finish(self, where);
        const WgmmaProduct& product = *due->product;
        const size_t each = due->sums.size();
        for (size_t i = 0; i < each; i++) {
            uint32_t& bits = *due->sums[i];
            if (bits == tag_of(product.serial, int(i))) {
                bits = std::bit_cast<uint32_t>(product.sums[thread * each + i]);
            } else if (!is_tag(bits)) {
                machine().fail("wgmma at %s:%u: sum %zu was written before the wait_group of its product",
                               product.where.file_name(), product.where.line(), i);
            }
        }
        self.pending.erase(self.pending.begin());
    }
    self.fenced = false;
}

void Warpgroups::wait_moved(int groups, uint32_t* const* registers, int count, Where where) {
    IgnoreAccesses ignore;
    Member& self = member();
    const size_t thread = size_t(machine().current->linear % kWarpgroupThreads);
    while (Member::Pending* due = self.due(groups)) {
        finish(self, where);
        const WgmmaProduct& product = *due->product;
        for (int i = 0; i < count; i++) {
            const uint32_t index = *registers[i] & 127;
            if (*registers[i] != tag_of(product.serial, int(index))) continue;
            *registers[i] = std::bit_cast<uint32_t>(product.sums[thread * due->sums.size() + index]);
        }
        self.pending.erase(self.pending.begin());
    }
    self.fenced = false;
}

// Returns when the oldest pending product is computed.
void Warpgroups::finish(Member& self, Where where) {
    const Member::Pending& due = self.pending.front();
    WgmmaProduct& product = *due.product;
    while (product.issued < kWarpgroupThreads) {
        group().waiting.push_back(machine().current);
        machine().wait_in_collective("wgmma.wait_group", where);
    }
    for (size_t i = 0; i < due.a.size(); i++) {
        if (*due.a[i] == product.a[machine().current->linear % kWarpgroupThreads][i]) continue;
        machine().fail("wgmma at %s:%u: register %zu of a was written before the wait_group of its product",
                       product.where.file_name(), product.where.line(), i);
    }
    complete_product(product);
    tsan_acquire(product.done_token);
}

}  // namespace cuda_host
