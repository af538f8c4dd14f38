// linear_nf4_grad_x: grad_x[m, k] = sum_n grad_y[m, n] * w_hat[n, k], fp32 accumulators.
//
// It uses panels of W itself (gemm.h): 2 * kLanes columns k of consecutive rows n. The pairs of vdpbf16ps are two
// interleaved rows, so that nothing is transposed.
#include "linear.h"
#include "ops.h"

namespace qlora::QLORA_ISA {
namespace {

template <class T>
void grad_x(const LinearProblem& p, const T* grad_y, T* out) {
    using Mac = typename Arithmetic<T>::Mac;
    const int64_t K = p.weight.K;
    const LhsView<Mac> a = lhs_view<Mac>(Slot::kRows, grad_y, p.M, p.weight.N);
    panel_gemm<Mac, kVectors>(
        a, K, weight_rows<T>(p.weight),
        [&](int64_t tile, int64_t column0, int64_t columns, const float* c) {
            store_tile<kColumns>(c, a.tiling, tile, column0, columns, K, out);
        },
        [&](int64_t column0, int64_t columns) {
            StripEnd<Mac> end;
            store_in_kernel(out, K, column0, columns, end);
            return end;
        });
}

}  // namespace

void linear_nf4_grad_x(const LinearProblem& p, const void* grad_y, void* out) {
    if (p.M == 0) return;
    with_type(p.dtype, [&]<class T>(T*) { grad_x(p, static_cast<const T*>(grad_y), static_cast<T*>(out)); });
}

}  // namespace qlora::QLORA_ISA
