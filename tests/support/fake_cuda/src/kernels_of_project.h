#pragma once

#include <string_view>
#include <vector>

struct KernelParameters {
    std::string_view kernel;  // mangled
    struct Parameter {
        unsigned offset, bytes;
    };
    std::vector<Parameter> parameters;
};

const std::vector<KernelParameters>& kernel_parameters();
