"""Gradient checkpointing recomputes a region with the adapters that were active in its forward.

torch.utils.checkpoint runs a region again in the backward pass, after the call has returned: perhaps another adapter is
active by then, the rows of the batch are forgotten, or the thread is one of autograd's own. As the state of the random
generators and of autocast does, the state of the adapters belongs to what a region saves. torch has no place where such
a state can be registered for both of its variants, and the call of checkpoint is in the models' code. So the two
classes that keep a region's function between forward and backward are changed here to keep the state with it.
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
    """Make torch's checkpoints save the state of all adapters; called for each PeftModel, and done once.

    Warns where this torch's checkpoint works in another way: then the adapters must not change between forward and
    backward.
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
    """`method`, whose second argument is a region's function, with one that runs in the present state."""

    @functools.wraps(method)
    def wrapper(owner: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return method(owner, in_present_state(function), *args, **kwargs)

    wrapper.saves_adapter_state = True  # type: ignore[attr-defined]
    return wrapper


def in_present_state(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as it would run now, whenever and in whatever thread it is called."""
    states = capture_states()

    def run(*args: Any, **kwargs: Any) -> Any:
        with using_states(states):
            return function(*args, **kwargs)

    return run
