// linear_cross_entropy on register tiles, for each dtype of the hidden states.
#include "linear_cross_entropy.h"

#include "ops.h"

namespace qlora::QLORA_ISA {

void linear_cross_entropy(const CrossEntropyProblem& p, const void* hidden, const CrossEntropyResults& results) {
    with_type(p.dtype, [&]<class T>(T*) {
        CrossEntropy<T, RegisterTiles<typename Arithmetic<T>::Mac>>(p, hidden, results).run();
    });
}

}  // namespace qlora::QLORA_ISA
