// Bank conflicts: groups the lanes' accesses into instructions of warps and counts their wavefronts.
#include "cuda_host/banks.h"

#include <algorithm>
#include <set>

#include "cuda_host/machine.h"

namespace cuda_host {

BankCounter& bank_counter() {
    static BankCounter instance;
    return instance;
}

CUDA_HOST_RUNTIME void BankCounter::access(int thread, int line, uint32_t address, uint32_t bytes) {
    IgnoreAccesses ignore;
    const int execution = executions_[{thread, line}]++;
    instructions_[{thread / kWarpLanes, line, execution}].push_back({uint32_t(thread % kWarpLanes), address, bytes});
}

CUDA_HOST_RUNTIME void BankCounter::finish_block() {
    constexpr int kBanks = 32, kWordBytes = 4;
    for (const auto& [key, accesses] : instructions_) {
        Counts& counts = by_line[key.line];
        counts.instructions++;
        const uint32_t bytes = accesses.front().bytes, lanes = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
        for (uint32_t first = 0; first < kWarpLanes; first += lanes) {
            std::set<uint32_t> words_of_bank[kBanks];
            for (const Access& access : accesses) {
                if (access.lane < first || access.lane >= first + lanes) continue;
                for (uint32_t word = access.address / kWordBytes;
                     word <= (access.address + access.bytes - 1) / kWordBytes; word++) {
                    words_of_bank[word % kBanks].insert(word);
                }
            }
            size_t most = 0;
            for (const auto& words : words_of_bank) most = std::max(most, words.size());
            counts.wavefronts += long(most);
            counts.needed += most > 0;
        }
    }
    instructions_.clear();
    executions_.clear();
}

}  // namespace cuda_host

extern "C" {

// Starts counting from zero, or stops.
void cuda_host_count_banks(int enabled) {
    cuda_host::bank_counter() = {};
    cuda_host::bank_counter().enabled = enabled;
}

int cuda_host_bank_lines() { return int(cuda_host::bank_counter().by_line.size()); }

// values: the line in the PTX file, instructions of warps, wavefronts, wavefronts without any conflict.
void cuda_host_bank_line(int index, long* values) {
    const auto& [line, counts] = *std::next(cuda_host::bank_counter().by_line.begin(), index);
    values[0] = line, values[1] = counts.instructions, values[2] = counts.wavefronts, values[3] = counts.needed;
}
}
