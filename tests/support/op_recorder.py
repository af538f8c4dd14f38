"""Dispatch modes that record which ops run, and the results of one op."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class OpRecorder(TorchDispatchMode):
    """Records the names of the ops that run inside it, in order."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class OpResults(TorchDispatchMode):
    """Stores the results of the calls of one op, by its name."""

    def __init__(self, name):
        super().__init__()
        self.name, self.results = name, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op._schema.name == f"qlora_kernels::{self.name}":
            self.results.append(result)
        return result
