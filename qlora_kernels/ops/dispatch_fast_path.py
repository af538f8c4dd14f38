"""Direct call of an op's kernel from its Autograd kernel, without a second pass through torch's dispatcher.

torch calls an op's kernel at the Autograd dispatch key first, and that kernel has to run the op below autograd. The
general way is a redispatch with the remaining keys. If the remaining keys name one backend and nothing else (no
dispatch mode, functorch transform, tensor subclass or lazy negation), a redispatch would call the backend's kernel at
once, so that kernel is called as a Python function instead.

Measured gain on a 64x64 LinearNF4 at M = 1 (torch 2.13, one Zen 4 core): 13 of 98 us without a
gradient and 17 of 141 us with one (medians of 60 interleaved rounds of 1,500 calls on a busy machine).

This is the only file that reads torch's private dispatch keys. Fallback: where a version of torch lacks one of the
names used to recognise a plain call, every call is redispatched, which gives the same results
(tests/ops/test_dispatch.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Kernel = Callable[..., Any]


def call_below_autograd(op: Any, kernel: Kernel) -> Callable[..., Any]:
    """Return run(keyset, *args, **keywords), which runs the op without its Autograd kernel.

    op: the OpOverload.   kernel: the function registered for it on every device.
    keyset: the dispatch keys of the current call, as a kernel registered with_keyset receives them.
    """

    def run(keyset: Any, *args: Any, **keywords: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if keyset.raw_repr() & _BELOW_AUTOGRAD in PLAIN_KEYSETS:
                return kernel(*args, **keywords)
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **keywords)

    return run


def is_plain_call(*tensors: Tensor) -> bool:
    """Whether ops on these tensors would run their backend's kernels at once, with nothing else to observe the calls.

    False under torch.compile, dispatch and function modes, transforms of torch.func, forward-mode AD and for tensor
    subclasses, and in versions of torch without the private names that this file reads.
    """
    if torch.compiler.is_compiling() or not PLAIN_KEYSETS or torch._C._is_torch_function_mode_enabled():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    # A mode adds its key to the thread's keys. BackendSelect, for ops without tensor arguments, is always one of them.
    local = torch._C._dispatch_tls_local_include_set() - torch._C._dispatch_tls_local_exclude_set()
    if local.raw_repr() & _BELOW_AUTOGRAD & ~_BACKEND_SELECT:
        return False
    keys_of = torch._C._dispatch_keys
    for tensor in tensors:
        if type(tensor) not in _PLAIN_TENSORS or keys_of(tensor).raw_repr() & _BELOW_AUTOGRAD not in PLAIN_KEYSETS:
            return False
    return True


_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def below_autograd() -> AbstractContextManager[Any]:
    """Return a context in which ops skip their Autograd kernels."""
    context: AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return context


def _plain_keysets() -> tuple[int, tuple[int, ...], int]:
    """Return the mask of the keys below autograd, the keysets that, under this mask, hold only one backend, and the bit
    of BackendSelect.
    """
    try:
        keys = torch._C.DispatchKey
        # ADInplaceOrView is in every keyset, for ops that write to or alias an argument; these ops do neither.
        below = torch._C._after_autograd_keyset.remove(keys.ADInplaceOrView).raw_repr()
        plain = tuple(torch._C.DispatchKeySet(key).raw_repr() for key in (keys.CPU, keys.CUDA))
        return below, plain, torch._C.DispatchKeySet(keys.BackendSelect).raw_repr()
    except AttributeError:
        return 0, (), 0


_BELOW_AUTOGRAD, PLAIN_KEYSETS, _BACKEND_SELECT = _plain_keysets()
"""PLAIN_KEYSETS: the keysets, as bits, of calls that skip the redispatch. If empty, every call is redispatched."""
