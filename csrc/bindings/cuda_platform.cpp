// The environment of the library: torch's function for the current stream, the versions of driver and runtime, and the
// library's build record.
#include <dlfcn.h>

#include "cuda_tensors.h"

namespace qlora::cuda_bindings {
namespace {

constexpr const char* kTorchCuda = "libtorch_cuda.so";
constexpr const char* kStreamSymbol = "aoti_torch_get_current_cuda_stream";

using StreamFunction = AOTITorchError (*)(int32_t device_index, void** stream);

// Null if this torch does not have the function. libtorch_cuda.so exports it, and `import torch` loads that library
// with RTLD_LOCAL, so that an undefined symbol of this library would never be bound to it. RTLD_NOLOAD finds the loaded
// copy; RTLD_DEFAULT covers builds of torch that have CUDA in another library of the global scope.
StreamFunction find_stream_function() {
    void* const torch_cuda = dlopen(kTorchCuda, RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = torch_cuda ? dlsym(torch_cuda, kStreamSymbol) : nullptr;
    if (symbol == nullptr) symbol = dlsym(RTLD_DEFAULT, kStreamSymbol);
    return reinterpret_cast<StreamFunction>(symbol);
}

StreamFunction stream_function() {
    static const StreamFunction function = find_stream_function();
    return function;
}

bool has_current_stream() { return stream_function() != nullptr; }

int64_t driver_version() {
    int version = 0;
    check(cudaDriverGetVersion(&version), "cuda_driver_version");
    return version;
}

int64_t runtime_version() {
    int version = 0;
    check(cudaRuntimeGetVersion(&version), "cuda_runtime_version");
    return version;
}

// qlora_kernels/backends/cuda/availability.py reads this from the file, without loading it.
#define QLORA_TEXT(macro) QLORA_TEXT_OF(macro)
#define QLORA_TEXT_OF(value) #value
__attribute__((used)) const char kBuildRecord[] =
    "qlora_kernels build: archs=" QLORA_BUILT_ARCHS " cuda=" QLORA_TEXT(CUDART_VERSION);

}  // namespace

cudaStream_t current_stream(const Tensor& tensor) {
    const StreamFunction function = stream_function();
    STD_TORCH_CHECK(function != nullptr, "the current CUDA stream is unknown: ", kTorchCuda,
                    " is not loaded or does not export ", kStreamSymbol, "; install a torch that is built with CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(function(tensor.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
}

}  // namespace qlora::cuda_bindings

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def("cuda_has_current_stream() -> bool");
    m.def("cuda_driver_version() -> int");
    m.def("cuda_runtime_version() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CompositeExplicitAutograd, m) {
    m.impl("cuda_has_current_stream", TORCH_BOX(&qlora::cuda_bindings::has_current_stream));
    m.impl("cuda_driver_version", TORCH_BOX(&qlora::cuda_bindings::driver_version));
    m.impl("cuda_runtime_version", TORCH_BOX(&qlora::cuda_bindings::runtime_version));
}
