"""Recomputes regions of gradient checkpointing with the adapters that were active in the forward pass.

torch.utils.checkpoint runs a region again in the backward pass, after the call has returned. By then another adapter
may be active, the adapters by row are no longer set, and the thread may be one of autograd's. Like the states of the
random generators and of autocast, the state of the adapters must therefore be saved with the region. torch offers no
registration for such a state that works for both of its variants, and checkpoint is called in the models' code. This
module therefore changes the two classes that keep a region's function between forward and backward, so that they keep
the state too.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

from torch.utils import checkpoint

from ..core.adapter_selection import capture_states, using_states

_lock = threading.Lock()


def save_state_with_regions() -> None:
    """Make torch's checkpoints save the state of all adapters. Called for each PeftModel; only the first call has an
    effect.

    Warns if this version of torch implements checkpoint in another way. Then the adapters must not change between
    forward and backward.
    """
    with _lock:
        reentrant = getattr(checkpoint, "CheckpointFunction", None)
        non_reentrant = getattr(checkpoint, "_CheckpointFrame", None)
        if reentrant is None or non_reentrant is None:
            warnings.warn(
                "PeftModel: torch.utils.checkpoint must be that of torch 2.10 to 2.13, this torch has another; with "
                "gradient checkpointing, call backward before set_adapter",
                RuntimeWarning,
                stacklevel=3,
            )
            return
        if not getattr(reentrant.forward, "saves_adapter_state", False):
            reentrant.forward = staticmethod(_with_state(reentrant.forward))
        if not getattr(non_reentrant.__init__, "saves_adapter_state", False):
            non_reentrant.__init__ = _with_state(non_reentrant.__init__)


def _with_state(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `method` so that its second argument, a region's function, runs in the present state."""

    @functools.wraps(method)
    def wrapper(owner: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return method(owner, in_present_state(function), *args, **kwargs)

    wrapper.saves_adapter_state = True  # type: ignore[attr-defined]
    return wrapper


def in_present_state(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` bound to the present state, for calls at any time and in any thread."""
    states = capture_states()

    def run(*args: Any, **kwargs: Any) -> Any:
        with using_states(states):
            return function(*args, **kwargs)

    return run
