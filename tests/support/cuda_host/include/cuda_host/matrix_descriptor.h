// Matrices in shared memory as a wgmma's descriptors name them.
#pragma once

#include <vector>

#include "machine.h"
#include "sanitizers.h"

namespace cuda_host {

constexpr int kWgmmaDepth = 16;

// Reads elements [rows, 16], contiguous along k (K-major), or along the rows (MN-major). Adds what it read to `read`.
// Fails for descriptors and addresses that the PTX manual does not allow or that are not modelled.
void read_matrix(uint64_t descriptor, int rows, bool mn_major, Where where, uint16_t* elements,
                 std::vector<MemoryRange>& read);

// Fails where the matrix holds bytes that the asynchronous proxy does not see yet.
void check_visible(const std::vector<MemoryRange>& read, Where where);

}  // namespace cuda_host
