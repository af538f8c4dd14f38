// What wgmma sees of shared memory: bytes that ordinary instructions wrote, only after a fence.proxy.async.
#pragma once

#include <vector>

#include "machine.h"

namespace cuda_host {

class AsyncProxy {
  public:
    void start_block() { visible_.clear(); }
    // A TMA copy has written these bytes.
    void written(uint32_t address, size_t bytes);
    // fence.proxy.async: all that memory holds becomes visible. Whose writes they are is not distinguished.
    void fence();
    // Whether what memory holds at these addresses is visible.
    bool sees(uint32_t address, size_t bytes);

  private:
    uint8_t* visible(uint32_t address);

    std::vector<uint8_t> visible_;  // by shared address; empty until a block needs it
};

AsyncProxy& async_proxy();

}  // namespace cuda_host
