#pragma once

#include <string_view>
#include <vector>

struct KernelParameters {
    std::string_view kernel;  // mangled
    struct Parameter {
        unsigned offset, bytes;
        std::vector<unsigned> words;  // offsets in the block of the 8-byte words that the kernel loads
    };
    std::vector<Parameter> parameters;
};

const std::vector<KernelParameters>& kernel_parameters();
