"""Runs torch's CUDA kernels by its CPU kernels: the fake device's memory is host memory, so no copies are needed.

install() registers a Python kernel in front of every CUDA kernel of aten that has a CPU counterpart. Ops that allocate,
view or copy bytes are not replaced, so that torch's allocator, streams and copies are tested. Custom ops are not
replaced.
"""

from __future__ import annotations

import atexit
import ctypes
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .device import active

_KEPT = {
    "_efficientzerotensor",
    "_has_same_storage_numel",
    "_local_scalar_dense",
    "_pin_memory",
    "_reshape_alias",
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "is_pinned",
    "is_set_to",
    "pin_memory",
    "record_stream",
    "resize_",
    "set_",
    "unfold",
    "view",
    "view_as_complex",
    "view_as_real",
}
"""Ops that launch no kernel."""

_DEVICE_ONLY = ("_cudnn", "cudnn", "_cufft")
_HOST_KEYS = (
    "CPU",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
    "CompositeImplicitAutograd",
)

_HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_library: list[torch.library.Library] = []
_graph_nodes: list[object] = []  # a graph may be replayed as long as the process lives
_generators: dict[tuple[int, int], torch.Generator] = {}


def install() -> int:
    """Register the kernels once; return their number."""
    if _library:
        return 0
    library = torch.library.Library("aten", "IMPL")
    _library.append(library)
    served = [op for op in map(_op_to_serve, torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")) if op]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warnings about overridden kernels are expected
        for op in served:
            library.impl(op, _kernel(op), "CUDA", allow_override=True)
        library.impl(torch.ops.aten.copy_.default, _copy, "CUDA", allow_override=True)
        for op, function in _FORMULAS.items():
            library.impl(op, _kernel_of(op, function), "CUDA", allow_override=True)
    # Attention runs by matmul and softmax, because its fused kernels exist only for the device.
    for kind in ("cudnn", "flash", "mem_efficient"):
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
    # autograd's device thread runs Python here. It must have left it before the interpreter ends, which would unwind
    # the thread through C++ frames that terminate.
    atexit.register(time.sleep, 0.2)
    return len(served)


def host_view(tensor: Tensor) -> Tensor:
    """Return the same memory as a CPU tensor without a reference, valid during one op."""
    storage = tensor.untyped_storage()
    view = torch.empty(0, dtype=tensor.dtype)
    if storage.nbytes() == 0:
        return view.as_strided(tensor.shape, tensor.stride())
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    on_host = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return view.set_(on_host, tensor.storage_offset(), tensor.shape, tensor.stride())


def _op_to_serve(registration: str) -> torch._ops.OpOverload | None:
    """Return the overload of a name like "aten::add.Tensor" if the CPU can run it.

    Kernels that exist only for the device are kept; their launch reports the missing kernel.
    """
    namespace, _, rest = registration.partition("::")
    name, _, overload = rest.partition(".")
    if namespace != "aten" or name in _KEPT or name.startswith(_DEVICE_ONLY):
        return None
    packet = getattr(torch.ops.aten, name, None)
    on_host = any(torch._C._dispatch_has_kernel_for_dispatch_key(registration, key) for key in _HOST_KEYS)
    return getattr(packet, overload or "default", None) if on_host else None


def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """aten::mm.dtype, which has no CPU kernel: the exact operands multiplied in the result's dtype."""
    return a.to(out_dtype) @ b.to(out_dtype)


def _rms_norm_backward(
    grad: Tensor, x: Tensor, shape: list[int], rstd: Tensor, weight: Tensor | None, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """aten::_fused_rms_norm_backward, which has no CPU kernel, in fp32. mask: which gradients are wanted."""
    inner = tuple(range(-len(shape), 0))
    normalized, scaled = x.float() * rstd, grad.float() * (1.0 if weight is None else weight.float())
    grad_x = rstd * (scaled - normalized * (scaled * normalized).mean(inner, keepdim=True))
    grad_weight = (grad.float() * normalized).sum(tuple(range(x.dim() - len(shape))))
    return (
        grad_x.to(x.dtype) if mask[0] else None,
        grad_weight.to(weight.dtype) if mask[1] and weight is not None else None,
    )


_FORMULAS: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    torch.ops.aten.mm.dtype: _mm,
    torch.ops.aten._fused_rms_norm_backward.default: _rms_norm_backward,
}
"""Ops that have no CPU kernel."""


def _kernel(op: torch._ops.OpOverload) -> Callable[..., Any]:
    return _kernel_of(op, op)


def _kernel_of(op: torch._ops.OpOverload, function: Callable[..., Any]) -> Callable[..., Any]:
    """The device's kernel of `op`: `function` on the host."""
    takes_tensor = [str(argument.type) in ("Tensor", "Optional[Tensor]") for argument in op._schema.arguments]

    def run(*args: Any, **kwargs: Any) -> Any:
        # A number in a tensor's place must be promoted as a number; the overload would make a tensor of it.
        is_number = (isinstance(value, (int, float, complex)) for value in args)
        by_number = any(wanted and number for wanted, number in zip(takes_tensor, is_number, strict=False))
        call = _HostCall(op.overloadpacket if by_number else function, args, kwargs)
        return call.add_to_graph() if torch.cuda.is_current_stream_capturing() else call.run()

    run.__name__ = op._schema.name.replace("::", "_")
    return run


class _HostCall:
    """A call of `function` with the device's operands as CPU tensors."""

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.function = function
        self.originals: dict[int, Tensor] = {}  # by the id of its view
        self.views: list[Tensor] = []
        self.device: torch.device | None = None
        flat, spec = tree_flatten((args, kwargs))
        self.args, self.kwargs = tree_unflatten([self._on_host(value) for value in flat], spec)
        self.device = self.device or torch.device("cuda", torch.cuda.current_device())
        self.stream = torch.cuda.current_stream(self.device)
        if self.kwargs.get("pin_memory"):
            self.kwargs["pin_memory"] = False

    def run(self) -> Any:
        self.stream.synchronize()  # only this stream; other streams keep their queued work
        before = [(view.shape, view.data_ptr()) for view in self.views]
        result = self.function(*self.args, **self.kwargs)
        for view, was in zip(self.views, before, strict=True):
            if (view.shape, view.data_ptr()) != was:  # an out= tensor that the op resized
                original = self.originals[id(view)]
                original.resize_(view.shape)
                host_view(original).copy_(view)
        return tree_map(self._to_device, result)

    def add_to_graph(self) -> Any:
        """Add a node to the captured graph.

        The op runs on copies now, which gives the shapes of its results, and on the tensors' memory at each replay.
        """
        copies = {id(view): view.clone() for view in self.views}
        originals = {id(copies[id(view)]): self.originals[id(view)] for view in self.views}

        def copy_of(value: Any) -> Any:
            return copies.get(id(value), value)

        trial = self.function(*tree_map(copy_of, self.args), **tree_map(copy_of, self.kwargs))
        targets: list[Tensor] = []

        def result_for(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in originals:
                return originals[id(value)]
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=self.device)
            targets.append(host_view(made))
            return made

        answer = tree_map(result_for, trial)

        def replay(_: object) -> None:
            with torch.no_grad():
                results = tree_flatten(self.function(*self.args, **self.kwargs))[0]
                new = [v for v in results if isinstance(v, Tensor) and id(v) not in self.originals]
                for target, value in zip(targets, new, strict=True):
                    target.copy_(value)

        node = _HostFunction(replay)
        _graph_nodes.append(node)
        device = active()
        assert device is not None
        device.launch_host_function(self.stream.cuda_stream, node)
        return answer

    def _on_host(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_cuda:
            self.device = self.device or value.device
            view = host_view(value)
            self.originals[id(view)] = value
            self.views.append(view)
            return view
        if isinstance(value, torch.device) and value.type == "cuda":
            self.device = value if value.index is not None else torch.device("cuda", torch.cuda.current_device())
            return torch.device("cpu")
        if isinstance(value, torch.Generator) and value.device.type == "cuda":
            key = (id(value), value.initial_seed())
            return _generators.setdefault(key, torch.Generator().manual_seed(value.initial_seed()))
        return value

    def _to_device(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in self.originals:
            return self.originals[id(value)]
        result = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=self.device)
        host_view(result).copy_(value)
        return result


def _copy(destination: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Run aten::copy_: plain copies by torch's code and the runtime, conversions and gathers here."""
    same_layout = destination.is_contiguous() and source.is_contiguous() and destination.shape == source.shape
    if same_layout and destination.dtype == source.dtype and destination.is_conj() == source.is_conj():
        # For a backend without a copy_ of its own, the entry is torch's kernel for all devices.
        every_device = torch._C.DispatchKeySet(torch._C.DispatchKey.HPU)
        return torch.ops.aten.copy_.default.redispatch(every_device, destination, source, non_blocking)
    if torch.cuda.is_current_stream_capturing():
        return _HostCall(torch.ops.aten.copy_.default, (destination, source), {}).add_to_graph()
    for tensor in (destination, source):
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
    target = host_view(destination) if destination.is_cuda else destination
    target.copy_(host_view(source) if source.is_cuda else source)
    return destination
