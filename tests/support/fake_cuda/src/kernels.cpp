// Modules, kernels and launches. A kernel is a name, which a kernel library (plugin.h) runs on the CPU. An image of PTX
// text is translated into a library of its own. Other images are not read: their kernels are those of the library that
// FAKE_CUDA_KERNELS names.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "model.h"

namespace fake_cuda {
namespace {

constexpr int kMaxParameters = 64;
constexpr int kDefaultDynamicShared = 48 << 10;

fake_cuda_translate_function translator = nullptr;

// The library at `path`. It may ask for fake_cuda_owner, which this library exports.
KernelLibrary load_library(const char* path) {
    KernelLibrary loaded;
    void* const handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        fprintf(stderr, "fake_cuda: %s\n", dlerror());
        return loaded;
    }
    loaded.parameters = reinterpret_cast<fake_cuda_parameters_function>(dlsym(handle, FAKE_CUDA_PARAMETERS));
    loaded.launch = reinterpret_cast<fake_cuda_launch_function>(dlsym(handle, FAKE_CUDA_LAUNCH));
    return loaded;
}

const KernelLibrary* compiled_kernels() {
    static const KernelLibrary library = [] {
        const char* path = getenv("FAKE_CUDA_KERNELS");
        return path && *path ? load_library(path) : KernelLibrary{};
    }();
    return &library;
}

// PTX starts with a comment or a directive; fat binaries and ELF files start with bytes that are not text.
bool is_ptx(const char* image) {
    while (*image == ' ' || *image == '\n') image++;
    return !strncmp(image, "//", 2) || !strncmp(image, ".version", 8);
}

const KernelLibrary* translated(const char* ptx) {
    char path[4096];
    if (!translator || translator(ptx, path, sizeof path)) return nullptr;
    const KernelLibrary loaded = load_library(path);
    return loaded.launch ? new KernelLibrary(loaded) : nullptr;
}

// A launch's parameters, copied so that it can run after the call has returned.
struct Parameters {
    std::vector<uint64_t> words;
    std::vector<void*> pointers;
};

std::shared_ptr<Parameters> copied(void** parameters, const unsigned* offsets, const unsigned* bytes, int count) {
    auto copy = std::make_shared<Parameters>();
    size_t size = 0;
    for (int i = 0; i < count; i++) size = std::max<size_t>(size, offsets[i] + bytes[i]);
    copy->words.resize(size / sizeof(uint64_t) + 1);
    char* const start = reinterpret_cast<char*>(copy->words.data());
    for (int i = 0; i < count; i++) {
        memcpy(start + offsets[i], parameters[i], bytes[i]);
        copy->pointers.push_back(start + offsets[i]);
    }
    return copy;
}

CUfunction function(CUmodule module, const char* name) {
    const Guard guard(model().lock);
    auto [found, added] = module->functions.try_emplace(name, CUfunc_st{name, module, kDefaultDynamicShared});
    return &found->second;
}

CUresult variable(CUmodule module, const char* name, CUdeviceptr* pointer, size_t* bytes) {
    constexpr size_t kBytes = 1 << 16;  // the real size stands in the image
    const Guard guard(model().lock);
    auto& [memory, size] = module->variables[name];
    if (!memory) {
        const int device = current_context() ? current_context()->device : 0;
        if (const CUresult result = allocate(&memory, kBytes, device, false)) return result;
        size = kBytes;
    }
    if (pointer) *pointer = reinterpret_cast<CUdeviceptr>(memory);
    if (bytes) *bytes = size;
    return CUDA_SUCCESS;
}

}  // namespace
}  // namespace fake_cuda

using namespace fake_cuda;

FAKE_CUDA_API CUresult cuModuleGetLoadingMode(CUmoduleLoadingMode* mode) {
    *mode = CU_MODULE_LAZY_LOADING;
    return CUDA_SUCCESS;
}
FAKE_CUDA_API void fake_cuda_set_translator(fake_cuda_translate_function translate) { translator = translate; }
FAKE_CUDA_API CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    const char* const text = static_cast<const char*>(image);
    const bool translates = text && is_ptx(text) && !model().ignores_launches;
    const KernelLibrary* const library = translates ? translated(text) : compiled_kernels();
    if (!library) return CUDA_ERROR_INVALID_PTX;
    *module = new CUmod_st{library, {}, {}};
    return CUDA_SUCCESS;
}
FAKE_CUDA_API CUresult cuModuleLoadFatBinary(CUmodule* module, const void* image) {
    return cuModuleLoadData(module, image);
}
FAKE_CUDA_API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }  // launches may still refer to it
FAKE_CUDA_API CUresult cuModuleGetFunction(CUfunction* result, CUmodule module, const char* name) {
    *result = function(module, name);
    return CUDA_SUCCESS;
}
FAKE_CUDA_API CUresult cuModuleGetGlobal(CUdeviceptr* pointer, size_t* bytes, CUmodule module, const char* name) {
    return variable(module, name, pointer, bytes);
}
FAKE_CUDA_API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute name, CUfunction function) {
    switch (name) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
            *value = 1024;
            break;
        case CU_FUNC_ATTRIBUTE_NUM_REGS:
            *value = 32;
            break;
        case CU_FUNC_ATTRIBUTE_PTX_VERSION:
        case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
            *value = model().capability_major * 10 + model().capability_minor;
            break;
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
            *value = function->dynamic_shared_limit;
            break;
        default:
            *value = 0;
    }
    return CUDA_SUCCESS;
}
FAKE_CUDA_API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute name, int value) {
    if (name == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        function->dynamic_shared_limit = value;
        return CUDA_SUCCESS;
    }
    return name == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
FAKE_CUDA_API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

FAKE_CUDA_API CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                      unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                                      CUstream stream, void** parameters, void** extra) {
    if (model().ignores_launches) return CUDA_SUCCESS;
    if (!current_context()) return CUDA_ERROR_INVALID_CONTEXT;
    if (resolve(stream)->context != current_context()) return CUDA_ERROR_INVALID_HANDLE;
    if (static_cast<int>(shared_bytes) > function->dynamic_shared_limit) return CUDA_ERROR_INVALID_VALUE;
    if (extra) return CUDA_ERROR_NOT_SUPPORTED;
    const KernelLibrary& library = *function->module->library;
    unsigned offsets[kMaxParameters], bytes[kMaxParameters];
    const char* const name = function->name.c_str();
    const int count = library.parameters ? library.parameters(name, offsets, bytes, kMaxParameters) : -1;
    if (count < 0) {
        fprintf(stderr, "fake_cuda: nothing runs the kernel %s\n", name);
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    const auto copy = copied(parameters, offsets, bytes, count);
    const fake_cuda_launch launch{name,         {grid_x, grid_y, grid_z},  {block_x, block_y, block_z},
                                  shared_bytes, current_context()->device, copy->pointers.data()};
    return enqueue(stream, [=, run = library.launch] {
        (void)copy;  // keeps the parameters
        return static_cast<CUresult>(run(&launch));
    });
}
FAKE_CUDA_API CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** parameters, void** extra) {
    return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                          c->sharedMemBytes, c->hStream, parameters, extra);
}
