"""How many bytes a process holds and receives under FSDP2, from shapes alone. docs/scaling.md uses these formulas.

FSDP2 cuts dimension 0 of a tensor of n rows into parts of ceil(n / world) rows, of which the last ones are shorter or
empty, and gathers parts of full length. Tests compare the results with what gloo processes hold and receive.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """A tensor by its rows.   count: size of dimension 0.   nbytes: of one row."""

    count: int
    nbytes: int

    @property
    def total(self) -> int:
        """Bytes of the tensor."""
        return self.count * self.nbytes

    def held(self, world: int, rank: int) -> int:
        """Bytes of the part of process `rank`."""
        part = self._part(world)
        return self.nbytes * min(max(self.count - rank * part, 0), part)

    def gathered(self, world: int) -> int:
        """Bytes of one all-gather of it, padding included."""
        return self.nbytes * self._part(world) * world

    def _part(self, world: int) -> int:
        return -(-self.count // world)


def nf4_rows(out_features: int, in_features: int, *, blocksize: int = 64, double_quant: bool = True) -> list[Rows]:
    """The parameters of a LinearNF4 under make_shardable, without its bias."""
    numel = out_features * in_features
    blocks = -(-numel // blocksize)
    packed = Rows((numel + 1) // 2, 1)
    if not double_quant:
        return [packed, Rows(blocks, 4)]
    return [packed, Rows(blocks, 1), Rows(-(-blocks // 256), 4), Rows(1, 4)]


def dense_rows(out_features: int, in_features: int, *, itemsize: int = 2) -> list[Rows]:
    """A dense weight, in 16 bits by default."""
    return [Rows(out_features, in_features * itemsize)]


def lora_rows(out_features: int, in_features: int, r: int, *, itemsize: int = 4) -> list[Rows]:
    """lora_A [r, K] and lora_B [N, r], in fp32 by default."""
    return [Rows(r, in_features * itemsize), Rows(out_features, r * itemsize)]


def held_bytes(tensors: Iterable[Rows], world: int, rank: int = 0) -> int:
    """Bytes of all parts that process `rank` holds; rank 0 holds the most."""
    return sum(tensor.held(world, rank) for tensor in tensors)


def gathered_bytes(tensors: Iterable[Rows], world: int) -> int:
    """Bytes of all-gathers of all tensors, once each."""
    return sum(tensor.gathered(world) for tensor in tensors)
