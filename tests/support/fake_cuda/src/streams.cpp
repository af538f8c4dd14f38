// Streams are queues that are worked off in the caller's thread: at once, as late as possible, or in any order that
// events allow. A wait keeps the record that it is for. A capture collects a stream's work instead of queueing it.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <utility>

#include "model.h"

namespace fake_cuda {
namespace {

thread_local CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

bool waits(const CUstream stream) {
    const FakeWork& work = stream->queue.front();
    return work.awaited && !work.awaited->done;
}

void step(CUstream stream) {
    while (waits(stream)) step(stream->queue.front().awaited->stream);
    FakeWork work = std::move(stream->queue.front());
    stream->queue.pop_front();
    const CUresult result = work.run ? work.run() : CUDA_SUCCESS;
    if (result != CUDA_SUCCESS && model().late_error == CUDA_SUCCESS) model().late_error = result;
}

// Somebody waits for `stream`: one step of it or, in a random schedule, of any stream that can take one.
void progress(CUstream stream) {
    Model& m = model();
    if (m.schedule == Schedule::random) {
        std::vector<CUstream> ready;
        for (const CUstream s : m.streams)
            if (!s->queue.empty() && !waits(s)) ready.push_back(s);
        m.random = m.random * 6364136223846793005u + 1442695040888963407u;
        if (!ready.empty()) return step(ready[(m.random >> 33) % ready.size()]);
    }
    step(stream);
}

void drain(CUstream stream) {
    while (!stream->queue.empty()) progress(stream);
}

CUresult take_late_error() { return std::exchange(model().late_error, CUDA_SUCCESS); }

// The legacy default stream and blocking streams of a device wait for each other.
bool implicitly_ordered(const CUstream a, const CUstream b) {
    const CUstream legacy = model().default_streams[a->device];
    const bool one_is_legacy = (a == legacy) != (b == legacy);
    return a->device == b->device && one_is_legacy && !((a->flags | b->flags) & CU_STREAM_NON_BLOCKING);
}

CUresult add_work(CUstream stream, FakeWork work) {
    for (const CUstream other : model().streams)
        if (implicitly_ordered(stream, other)) drain(other);
    stream->queue.push_back(std::move(work));
    if (model().schedule != Schedule::eager) return CUDA_SUCCESS;
    drain(stream);
    return take_late_error();
}

CUresult violate(CUgraph capture) {
    capture->broken = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

double now_in_milliseconds() {
    using Milliseconds = std::chrono::duration<double, std::milli>;
    return Milliseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Pageable host memory is read before the call returns and has been written when it returns; page-locked memory not.
CUresult copy(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream, bool synchronous) {
    if (bytes == 0) return CUDA_SUCCESS;
    const Guard guard(model().lock);
    void* const target = reinterpret_cast<void*>(to);
    const void* source = reinterpret_cast<const void*>(from);
    const bool pageable_source = !find_block(source), pageable_target = !find_block(target);
    std::shared_ptr<char[]> staged;
    if (pageable_source && !synchronous && !resolve(stream)->capture) {
        staged = std::make_shared<char[]>(bytes);
        memcpy(staged.get(), source, bytes);
        source = staged.get();
    }
    const CUresult result = enqueue(stream, [=] {
        memmove(target, source, bytes);
        (void)staged;
        return CUDA_SUCCESS;
    });
    if (result != CUDA_SUCCESS || !(synchronous || pageable_target)) return result;
    return synchronize(stream);
}

template <class Element>
CUresult fill(CUdeviceptr to, Element value, size_t count, CUstream stream) {
    auto* const target = reinterpret_cast<Element*>(to);
    return enqueue(stream, [=] {
        std::fill_n(target, count, value);
        return CUDA_SUCCESS;
    });
}

}  // namespace

CUstream resolve(CUstream stream) {
    const bool is_default = stream == nullptr || stream == CU_STREAM_LEGACY || stream == CU_STREAM_PER_THREAD;
    const int device = current_context() ? current_context()->device : 0;
    return is_default ? model().default_streams[device] : stream;
}

CUresult enqueue(CUstream handle, std::function<CUresult()> run) {
    const Guard guard(model().lock);
    const CUstream stream = resolve(handle);
    if (!stream->capture) return add_work(stream, {std::move(run)});
    stream->capture->nodes.push_back(std::move(run));
    return CUDA_SUCCESS;
}

CUresult synchronize(CUstream handle) {
    const Guard guard(model().lock);
    const CUstream stream = resolve(handle);
    if (stream->capture) return violate(stream->capture);
    drain(stream);
    return take_late_error();
}

CUresult synchronize_device(int device) {
    const Guard guard(model().lock);
    for (size_t i = 0; i < model().streams.size(); i++)
        if (device == kHost || model().streams[i]->device == device) drain(model().streams[i]);
    return take_late_error();
}

bool forbidden_during_capture() {
    if (capture_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return false;
    const Guard guard(model().lock);
    bool captures = false;
    for (const CUstream stream : model().streams)
        if (stream->capture) captures = stream->capture->broken = true;
    return captures;
}

}  // namespace fake_cuda

using namespace fake_cuda;

FAKE_CUDA_API CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
    if (!current_context()) return CUDA_ERROR_INVALID_CONTEXT;
    const Guard guard(model().lock);
    *stream = new CUstream_st{current_context()->device, current_context(), flags, priority, model().next_id++, {}};
    model().streams.push_back(*stream);
    return CUDA_SUCCESS;
}
FAKE_CUDA_API CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
    return cuStreamCreateWithPriority(stream, flags, 0);
}
// Streams and events stay, because work and events refer to them.
FAKE_CUDA_API CUresult cuStreamDestroy(CUstream stream) { return synchronize(stream); }
FAKE_CUDA_API CUresult cuStreamSynchronize(CUstream stream) { return synchronize(stream); }
FAKE_CUDA_API CUresult cuStreamQuery(CUstream handle) {
    const Guard guard(model().lock);
    const CUstream stream = resolve(handle);
    if (stream->capture) return violate(stream->capture);
    if (stream->queue.empty()) return take_late_error();
    progress(stream);  // who polls must get there
    return CUDA_ERROR_NOT_READY;
}
FAKE_CUDA_API CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned) {
    const Guard guard(model().lock);
    const CUstream stream = resolve(handle);
    if (event->capture) {  // the waiting stream joins the capture
        if (event->capture->ended) return CUDA_ERROR_CAPTURED_EVENT;
        stream->capture = event->capture;
        return CUDA_SUCCESS;
    }
    if (!event->newest) return CUDA_SUCCESS;
    if (stream->capture) {
        stream->capture->broken = true;
        return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    return add_work(stream, {{}, event->newest});
}
FAKE_CUDA_API CUresult cuStreamGetPriority(CUstream stream, int* priority) {
    *priority = resolve(stream)->priority;
    return CUDA_SUCCESS;
}
FAKE_CUDA_API CUresult cuStreamGetFlags(CUstream stream, unsigned* flags) {
    *flags = resolve(stream)->flags;
    return CUDA_SUCCESS;
}
FAKE_CUDA_API CUresult cuStreamGetCtx(CUstream stream, CUcontext* context) {
    *context = resolve(stream)->context;
    return CUDA_SUCCESS;
}
FAKE_CUDA_API CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
    const CUgraph capture = resolve(stream)->capture;
    *status = !capture          ? CU_STREAM_CAPTURE_STATUS_NONE
              : capture->broken ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return CUDA_SUCCESS;
}
FAKE_CUDA_API CUresult cuStreamGetCaptureInfo(CUstream stream, CUstreamCaptureStatus* status, cuuint64_t* id,
                                              CUgraph* graph, const CUgraphNode** nodes, const CUgraphEdgeData** edges,
                                              size_t* count) {
    const CUgraph capture = resolve(stream)->capture;
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = capture;
    if (nodes) *nodes = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return cuStreamIsCapturing(stream, status);
}
FAKE_CUDA_API CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
    std::swap(*mode, capture_mode);
    return CUDA_SUCCESS;
}
FAKE_CUDA_API CUresult cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode) {
    const Guard guard(model().lock);
    const CUstream stream = resolve(handle);
    if (stream == model().default_streams[stream->device]) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
    stream->capture = new CUgraph_st{model().next_id++, {}};
    return CUDA_SUCCESS;
}
FAKE_CUDA_API CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    const Guard guard(model().lock);
    const CUgraph capture = resolve(handle)->capture;
    if (!capture) return CUDA_ERROR_ILLEGAL_STATE;
    for (const CUstream stream : model().streams)
        if (stream->capture == capture) stream->capture = nullptr;
    capture->ended = true;
    *graph = capture->broken ? nullptr : capture;
    return capture->broken ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
}
FAKE_CUDA_API CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
    *executable = reinterpret_cast<CUgraphExec>(graph);  // a graph is its own executable form, and stays
    return CUDA_SUCCESS;
}
FAKE_CUDA_API CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode* nodes, size_t* count) {
    if (nodes) return CUDA_ERROR_NOT_SUPPORTED;
    *count = graph->nodes.size();
    return CUDA_SUCCESS;
}
FAKE_CUDA_API CUresult cuGraphDestroy(CUgraph) { return CUDA_SUCCESS; }
FAKE_CUDA_API CUresult cuGraphExecDestroy(CUgraphExec) { return CUDA_SUCCESS; }
FAKE_CUDA_API CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
    const CUgraph graph = reinterpret_cast<CUgraph>(executable);
    return enqueue(stream, [graph] {
        for (const auto& node : graph->nodes)
            if (const CUresult result = node()) return result;
        return CUDA_SUCCESS;
    });
}
FAKE_CUDA_API CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* argument) {
    return enqueue(stream, [=] {
        function(argument);
        return CUDA_SUCCESS;
    });
}

FAKE_CUDA_API CUresult cuEventCreate(CUevent* event, unsigned) {
    if (!current_context()) return CUDA_ERROR_INVALID_CONTEXT;
    *event = new CUevent_st{current_context()->device};
    return CUDA_SUCCESS;
}
FAKE_CUDA_API CUresult cuEventDestroy(CUevent) { return CUDA_SUCCESS; }
FAKE_CUDA_API CUresult cuEventRecord(CUevent event, CUstream handle) {
    const Guard guard(model().lock);
    const CUstream stream = resolve(handle);
    if (stream->device != event->device) return CUDA_ERROR_INVALID_HANDLE;
    event->capture = stream->capture;
    if (stream->capture) return CUDA_SUCCESS;
    const auto record = std::make_shared<FakeRecord>(FakeRecord{stream});
    event->newest = record;
    return enqueue(handle, [record] {
        record->done = true;
        record->milliseconds = now_in_milliseconds();
        return CUDA_SUCCESS;
    });
}
FAKE_CUDA_API CUresult cuEventQuery(CUevent event) {
    const Guard guard(model().lock);
    if (event->capture) return CUDA_ERROR_CAPTURED_EVENT;
    if (!event->newest || event->newest->done) return CUDA_SUCCESS;
    progress(event->newest->stream);
    return CUDA_ERROR_NOT_READY;
}
FAKE_CUDA_API CUresult cuEventSynchronize(CUevent event) {
    const Guard guard(model().lock);
    if (event->capture) return CUDA_ERROR_CAPTURED_EVENT;
    const std::shared_ptr<const FakeRecord> record = event->newest;
    while (record && !record->done) progress(record->stream);
    return take_late_error();
}
FAKE_CUDA_API CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    const Guard guard(model().lock);
    if (start->capture || end->capture) return CUDA_ERROR_CAPTURED_EVENT;
    if (!start->newest || !end->newest) return CUDA_ERROR_INVALID_HANDLE;
    if (!start->newest->done || !end->newest->done) return CUDA_ERROR_NOT_READY;
    *milliseconds = static_cast<float>(end->newest->milliseconds - start->newest->milliseconds);
    return CUDA_SUCCESS;
}

FAKE_CUDA_API CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    return copy(to, from, bytes, nullptr, true);
}
FAKE_CUDA_API CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return copy(to, from, bytes, stream, false);
}
FAKE_CUDA_API CUresult cuMemsetD8(CUdeviceptr to, unsigned char value, size_t count) {
    return fill(to, value, count, nullptr);
}
FAKE_CUDA_API CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
    return fill(to, value, count, stream);
}
FAKE_CUDA_API CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
    return fill(to, value, count, stream);
}
