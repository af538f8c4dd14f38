// Counts the wavefronts of shared-memory instructions in translated PTX: 32 banks of 4 bytes, a wavefront for each word
// beyond the first that one bank must serve. Lanes of 8-byte accesses are served 16 at a time, those of 16-byte
// accesses 8 at a time (CUDA programming guide, shared memory; Nsight Compute's "shared wavefronts").
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace cuda_host {

class BankCounter {
  public:
    struct Counts {
        long instructions = 0;  // of warps
        long wavefronts = 0;
        long needed = 0;  // wavefronts without any conflict
    };

    bool enabled = false;
    std::map<int, Counts> by_line;  // of the PTX file

    // One lane's part of the instruction in `line`. The k-th execution by each lane of a warp is one instruction of it.
    void access(int thread, int line, uint32_t address, uint32_t bytes);
    // Counts what the block has accessed.
    void finish_block();

  private:
    struct Access {
        uint32_t lane, address, bytes;
    };
    struct Key {
        int warp, line, execution;
        auto operator<=>(const Key&) const = default;
    };
    std::map<Key, std::vector<Access>> instructions_;
    std::map<std::pair<int, int>, int> executions_;  // of (thread, line)
};

BankCounter& bank_counter();

}  // namespace cuda_host
