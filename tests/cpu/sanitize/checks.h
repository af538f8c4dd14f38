// Declarations that the parts of the driver share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <random>
#include <vector>

#include "qlora/dtypes.h"

namespace checks {

extern std::atomic<int> failures;

// Counts and reports a failure unless `ok`.
void expect(bool ok, const char* what, const char* where);

// All kernels without a matmul (elementwise.cpp).
void check_codec();
void check_dropout();
void check_adamw();

// linear_group.cpp
void check_linear_groups();

// cross_entropy.cpp
void check_cross_entropy();
// The ops between linear layers (model_parts.cpp).
void check_model_parts();

// attention.cpp
void check_attention();

inline std::vector<float> normal(int64_t n, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> distribution;
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) value = distribution(generator);
    return values;
}

template <class T>
std::vector<T> rounded(const std::vector<float>& values) {
    std::vector<T> result(values.size());
    std::transform(values.begin(), values.end(), result.begin(), [](float v) { return qlora::from_float<T>(v); });
    return result;
}

}  // namespace checks
