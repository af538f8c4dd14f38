// Layouts of wgmma's operands in shared memory (PTX manual, "Shared Memory Matrix Layout"; CUTLASS, mma_sm90_desc.hpp).
#include "cuda_host/matrix_descriptor.h"

#include <cstring>

#include "cuda_host/async_proxy.h"
#include "cuda_host/tensor_copy.h"

namespace cuda_host {
namespace {

constexpr uint32_t kPiece = 16;  // bytes that a layout keeps together
constexpr uint32_t kPieceElements = 8;

struct Descriptor {
    uint32_t start, leading, stride;
    uint32_t span;  // of the swizzle in bytes, 0 for none

    // The address of piece `piece` of row `row`, contiguous along k: rows of the swizzle's span, eight of them a
    // pattern, patterns `stride` apart; without a swizzle, core matrices of 8 rows of 16 bytes, `leading` apart along k
    // and `stride` apart along the rows.
    uint32_t k_major(uint32_t row, uint32_t piece) const {
        if (!span) return start + row / 8 * stride + row % 8 * kPiece + piece * leading;
        return swizzled(start + row / 8 * stride + row % 8 * span + piece * kPiece, int(span));
    }
    // The address of piece `piece` along the rows at depth k, contiguous along the rows: a span of rows for each k,
    // eight of them a pattern; patterns `leading` apart along the rows and `stride` apart along k. Without a swizzle
    // the two are exchanged.
    uint32_t mn_major(uint32_t k, uint32_t piece) const {
        if (!span) return start + piece * stride + k % 8 * kPiece + k / 8 * leading;
        const uint32_t pieces = span / kPiece;
        const uint32_t pattern = start + piece / pieces * leading + k / 8 * stride;
        return swizzled(pattern + k % 8 * span + piece % pieces * kPiece, int(span));
    }
};

Descriptor decoded(uint64_t bits, bool mn_major, Where where) {
    constexpr uint32_t kSpans[] = {0, 128, 64, 32};
    auto field = [bits](int shift) { return uint32_t(bits >> shift & 0x3FFF) << 4; };
    const Descriptor d{field(0), field(16), field(32), kSpans[bits >> 62]};
    const char* file = where.file_name();
    const unsigned line = where.line();
    if (bits >> 49 & 7) machine().fail("wgmma at %s:%u: a base offset of a descriptor is not modelled", file, line);
    if (!d.span) return d;
    if (d.start >> 7 & (d.span / kPiece - 1)) {
        machine().fail("wgmma at %s:%u: a tile with a %u-byte swizzle must begin at a multiple of %u bytes, got %#x",
                       file, line, d.span, d.span * 8, d.start);
    }
    if (!mn_major && d.start % d.span + kWgmmaDepth * 2 > d.span) {
        machine().fail("wgmma at %s:%u: 16 elements from %#x on leave the %u-byte rows of the swizzle", file, line,
                       d.start, d.span);
    }
    return d;
}

const char* piece_at(uint32_t address, Where where, std::vector<MemoryRange>& read) {
    const char* from = machine().shared_pointer(address, kPiece);
    if (!from) {
        machine().fail("wgmma at %s:%u: shared address %#x of an operand is outside every shared variable",
                       where.file_name(), where.line(), address);
    }
    read.push_back({from, kPiece});
    return from;
}

}  // namespace

void read_matrix(uint64_t descriptor, int rows, bool mn_major, Where where, uint16_t* elements,
                 std::vector<MemoryRange>& read) {
    const Descriptor d = decoded(descriptor, mn_major, where);
    const uint32_t lines = mn_major ? kWgmmaDepth : uint32_t(rows);
    const uint32_t pieces = (mn_major ? uint32_t(rows) : kWgmmaDepth) / kPieceElements;
    for (uint32_t line = 0; line < lines; line++) {
        for (uint32_t piece = 0; piece < pieces; piece++) {
            uint16_t values[kPieceElements];
            memcpy(values, piece_at(mn_major ? d.mn_major(line, piece) : d.k_major(line, piece), where, read), kPiece);
            for (uint32_t i = 0; i < kPieceElements; i++) {
                const uint32_t along = piece * kPieceElements + i;
                elements[mn_major ? along * kWgmmaDepth + line : line * kWgmmaDepth + along] = values[i];
            }
        }
    }
}

void check_visible(const std::vector<MemoryRange>& read, Where where) {
    for (const MemoryRange& range : read) {
        const int64_t address = machine().shared_address(range.begin, range.bytes);
        if (async_proxy().sees(uint32_t(address), range.bytes)) continue;
        machine().fail(
            "wgmma at %s:%u: the 16 bytes at shared address %#lx were written by ordinary instructions, and no "
            "fence.proxy.async followed",
            where.file_name(), where.line(), (unsigned long)address);
    }
}

}  // namespace cuda_host
