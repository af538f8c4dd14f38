// Scratch memory that is kept between calls. A new weight-sized buffer costs more in page faults than the decode that
// fills it (about 9 ms against 1 ms for 4096 x 4096 in bf16), so each thread keeps its buffers.
#pragma once

#include <cstddef>

namespace qlora {

// One buffer per purpose and thread. Buffers of different purposes never alias, and one op at a time uses a purpose.
enum class Slot { kRows, kFactorRows, kPanel, kPartial, kBits, kSmall, kFactors, kCount };

// Returns at least `bytes` bytes, 64-byte aligned, owned by the calling thread until it ends; contents are undefined.
void* workspace(Slot slot, size_t bytes);

}  // namespace qlora
