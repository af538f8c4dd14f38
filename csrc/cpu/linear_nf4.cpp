// linear_nf4: y[m, n] = bias[n] + sum_k x[m, k] * w_hat[n, k], fp32 accumulators.
//
// Up to some tens of tokens use dots.h. More tokens use panels of W^T (gemm.h): 2 * kLanes columns n, decoded row by
// row along k and transposed in registers.
#include "dots.h"
#include "ops.h"

namespace qlora::QLORA_ISA {
namespace {

template <class T>
void linear(const LinearProblem& p, const T* x, AnyFloat bias, T* y) {
    using Mac = typename Arithmetic<T>::Mac;
    const int64_t N = p.weight.N;
    const float* bias_values = bias_as_float(bias, N);
    if (suits_dots<Mac>(p.weight, p.M)) {
        return linear_dots(p.weight, p.M, x, bias_values, y, [&](int64_t, int, float* sums) {
            memset(sums, 0, static_cast<size_t>(p.M * kGroup) * sizeof(float));
        });
    }
    const LhsView<Mac> a = lhs_view<Mac>(Slot::kRows, x, p.M, p.weight.K);
    panel_gemm<Mac, kVectors>(
        a, N, weight_columns<T>(p.weight),
        [&](int64_t tile, int64_t column0, int64_t columns, const float* c) {
            store_tile<kColumns>(c, a.tiling, tile, column0, columns, N, y, bias_values);
        },
        [&](int64_t column0, int64_t columns) {
            StripEnd<Mac> end;
            if (!bias_values) store_in_kernel(y, N, column0, columns, end);
            return end;
        });
}

}  // namespace

void linear_nf4(const LinearProblem& p, const void* x, AnyFloat bias, void* y) {
    if (p.M == 0) return;
    with_type(p.dtype, [&]<class T>(T*) { linear(p, static_cast<const T*>(x), bias, static_cast<T*>(y)); });
}

}  // namespace qlora::QLORA_ISA
