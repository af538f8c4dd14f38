// What the launchers asked of the CUDA runtime, and which of those calls shall fail.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>
#include <map>
#include <string>
#include <vector>

namespace cuda_host {

class RuntimeLog {
  public:
    // One line a call: its name, an optional text, its integers.
    void record(const char* call, std::initializer_list<long> values, const std::string& text = "");

    // The error that `call` has been told to fail with this time, or cudaSuccess.
    cudaError_t injected(const char* call);
    void inject(const std::string& call, cudaError_t error, int after);

    // Remembers an error for cudaGetLastError and returns it.
    cudaError_t finish(cudaError_t error);
    cudaError_t last_error(bool clear);

    // record + injected: `return log.call(...)` for calls whose only effect is the record.
    cudaError_t call(const char* name, std::initializer_list<long> values);

    // Streams, events and pointers appear in the log as small numbers, in order of first appearance; null is 0.
    long handle(const void* pointer);

    void allow_dynamic_shared(const void* function, size_t bytes) { dynamic_shared_[function] = bytes; }
    size_t allowed_dynamic_shared(const void* function) { return dynamic_shared_[function]; }

    std::vector<std::string> lines;

  private:
    struct Injection {
        cudaError_t error;
        int after;
    };
    std::map<std::string, Injection> injections_;
    std::map<const void*, long> handles_;
    std::map<const void*, size_t> dynamic_shared_;
    cudaError_t last_error_ = cudaSuccess;
};

RuntimeLog& runtime_log();

}  // namespace cuda_host
