"""Counts of the bytes that FSDP2's collectives move."""

from __future__ import annotations

from functools import partial

import torch.distributed as dist


class counting:
    """Records the number of bytes of each all-gather or reduce-scatter of FSDP2, for the whole tensors."""

    def __init__(self, collective: str, argument: str, sizes: list[int]) -> None:
        # In newer versions of torch, names that end in "single" have replaced the older ones.
        older = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}[collective]
        names = [name for name in (f"{collective}_single", older) if hasattr(dist, name)]
        self.originals = {name: getattr(dist, name) for name in names}
        self.argument, self.sizes = argument, sizes

    def __enter__(self):
        for name, function in self.originals.items():
            setattr(dist, name, partial(self._count, function))

    def __exit__(self, *_):
        for name, function in self.originals.items():
            setattr(dist, name, function)

    def _count(self, function, *arguments, **options):
        tensor = arguments[0] if arguments else options[self.argument]
        self.sizes.append(tensor.nbytes)
        return function(*arguments, **options)
