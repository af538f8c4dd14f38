// libcudart.so.13, streams, events and graphs.
#include "runtime.h"

FAKE_CUDA_API cudaError_t cudaStreamCreate(cudaStream_t* s) { FAKE_CUDA_DRIVER(cuStreamCreate(s, 0)); }
FAKE_CUDA_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) {
    FAKE_CUDA_DRIVER(cuStreamCreate(s, flags));
}
FAKE_CUDA_API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned flags, int priority) {
    FAKE_CUDA_DRIVER(cuStreamCreateWithPriority(s, flags, priority));
}
FAKE_CUDA_API cudaError_t cudaStreamDestroy(cudaStream_t s) { FAKE_CUDA_DRIVER(cuStreamDestroy(s)); }
FAKE_CUDA_API cudaError_t cudaStreamSynchronize(cudaStream_t s) { FAKE_CUDA_DRIVER(cuStreamSynchronize(s)); }
FAKE_CUDA_API cudaError_t cudaStreamQuery(cudaStream_t s) { FAKE_CUDA_DRIVER(cuStreamQuery(s)); }
FAKE_CUDA_API cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t event, unsigned flags) {
    FAKE_CUDA_DRIVER(cuStreamWaitEvent(s, event, flags));
}
FAKE_CUDA_API cudaError_t cudaStreamGetPriority(cudaStream_t s, int* priority) {
    FAKE_CUDA_DRIVER(cuStreamGetPriority(s, priority));
}
FAKE_CUDA_API cudaError_t cudaStreamGetFlags(cudaStream_t s, unsigned* flags) {
    FAKE_CUDA_DRIVER(cuStreamGetFlags(s, flags));
}
FAKE_CUDA_API cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
    FAKE_CUDA_DRIVER(cuStreamIsCapturing(s, reinterpret_cast<CUstreamCaptureStatus*>(status)));
}
FAKE_CUDA_API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* status,
                                                   unsigned long long* id, cudaGraph_t* graph,
                                                   const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                                   size_t* count) {
    if (edges) *edges = nullptr;
    FAKE_CUDA_DRIVER(cuStreamGetCaptureInfo(s, reinterpret_cast<CUstreamCaptureStatus*>(status),
                                            reinterpret_cast<cuuint64_t*>(id), graph, nodes, nullptr, count));
}
FAKE_CUDA_API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    FAKE_CUDA_BEGIN();
    return fake_cuda::finish(cuThreadExchangeStreamCaptureMode(reinterpret_cast<CUstreamCaptureMode*>(mode)));
}
FAKE_CUDA_API cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode) {
    FAKE_CUDA_DRIVER(cuStreamBeginCapture(s, static_cast<CUstreamCaptureMode>(mode)));
}
FAKE_CUDA_API cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
    FAKE_CUDA_DRIVER(cuStreamEndCapture(s, graph));
}
FAKE_CUDA_API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                                        unsigned long long flags) {
    FAKE_CUDA_DRIVER(cuGraphInstantiateWithFlags(executable, graph, flags));
}
FAKE_CUDA_API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                               unsigned long long flags) {
    FAKE_CUDA_DRIVER(cuGraphInstantiateWithFlags(executable, graph, flags));
}
FAKE_CUDA_API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
    FAKE_CUDA_DRIVER(cuGraphGetNodes(graph, nodes, count));
}
FAKE_CUDA_API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t s) {
    FAKE_CUDA_DRIVER(cuGraphLaunch(executable, s));
}
FAKE_CUDA_API cudaError_t cudaGraphDestroy(cudaGraph_t graph) { FAKE_CUDA_DRIVER(cuGraphDestroy(graph)); }
FAKE_CUDA_API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { FAKE_CUDA_DRIVER(cuGraphExecDestroy(graph)); }
FAKE_CUDA_API cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t function, void* argument) {
    FAKE_CUDA_DRIVER(cuLaunchHostFunc(s, function, argument));
}

FAKE_CUDA_API cudaError_t cudaEventCreate(cudaEvent_t* event) { FAKE_CUDA_DRIVER(cuEventCreate(event, 0)); }
FAKE_CUDA_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    FAKE_CUDA_DRIVER(cuEventCreate(event, flags));
}
FAKE_CUDA_API cudaError_t cudaEventDestroy(cudaEvent_t event) { FAKE_CUDA_DRIVER(cuEventDestroy(event)); }
FAKE_CUDA_API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t s) {
    FAKE_CUDA_DRIVER(cuEventRecord(event, s));
}
FAKE_CUDA_API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t s, unsigned) {
    FAKE_CUDA_DRIVER(cuEventRecord(event, s));
}
FAKE_CUDA_API cudaError_t cudaEventQuery(cudaEvent_t event) { FAKE_CUDA_DRIVER(cuEventQuery(event)); }
FAKE_CUDA_API cudaError_t cudaEventSynchronize(cudaEvent_t event) { FAKE_CUDA_DRIVER(cuEventSynchronize(event)); }
FAKE_CUDA_API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
    FAKE_CUDA_DRIVER(cuEventElapsedTime(milliseconds, start, end));
}
