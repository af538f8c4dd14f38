// Scratch memory that outlives a call. A fresh weight-sized buffer costs more in page faults than the decode that fills
// it (about 9 ms against 1 ms for 4096 x 4096 in bf16), so each thread keeps what it once needed.
#pragma once

#include <cstddef>

namespace qlora {

// One buffer per purpose and thread; two purposes never alias, one purpose is used by one op at a time.
enum class Slot { kRows, kFactorRows, kPanel, kPartial, kBits, kSmall, kFactors, kCount };

// At least `bytes` bytes, 64-byte aligned, owned by the calling thread until it ends; contents are undefined.
void* workspace(Slot slot, size_t bytes);

}  // namespace qlora
