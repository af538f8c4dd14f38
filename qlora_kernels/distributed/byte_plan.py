"""Bytes that a process holds and receives under FSDP2, computed from shapes; docs/scaling.md uses these formulas.

FSDP2 splits dimension 0 of a tensor of n rows into parts of ceil(n / world) rows, of which the last ones are shorter or
empty, and gathers parts of full length. Tests compare the results with those of gloo processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..rounding import cdiv


@dataclass(frozen=True)
class Rows:
    """A tensor in terms of its rows.   count: size of dimension 0.   nbytes: of one row."""

    count: int
    nbytes: int

    @property
    def total(self) -> int:
        """Return the bytes of the whole tensor."""
        return self.count * self.nbytes

    def held(self, world: int, rank: int) -> int:
        """Return the bytes of process `rank`'s part."""
        part = self._part(world)
        return self.nbytes * min(max(self.count - rank * part, 0), part)

    def gathered(self, world: int) -> int:
        """Return the bytes of one all-gather, padding included."""
        return self.nbytes * self._part(world) * world

    def _part(self, world: int) -> int:
        return cdiv(self.count, world)


def nf4_rows(out_features: int, in_features: int, *, blocksize: int = 64, double_quant: bool = True) -> list[Rows]:
    """Return the parameters of a LinearNF4 under make_shardable, without its bias."""
    numel = out_features * in_features
    blocks = cdiv(numel, blocksize)
    packed = Rows((numel + 1) // 2, 1)
    if not double_quant:
        return [packed, Rows(blocks, 4)]
    return [packed, Rows(blocks, 1), Rows(cdiv(blocks, 256), 4), Rows(1, 4)]


def dense_rows(out_features: int, in_features: int, *, itemsize: int = 2) -> list[Rows]:
    """Return a dense weight, in 16 bits by default."""
    return [Rows(out_features, in_features * itemsize)]


def lora_rows(out_features: int, in_features: int, r: int, *, itemsize: int = 4) -> list[Rows]:
    """Return lora_A [r, K] and lora_B [N, r], in fp32 by default."""
    return [Rows(r, in_features * itemsize), Rows(out_features, r * itemsize)]


def held_bytes(tensors: Iterable[Rows], world: int, rank: int = 0) -> int:
    """Return the bytes of all parts that process `rank` holds; rank 0 holds the most."""
    return sum(tensor.held(world, rank) for tensor in tensors)


def gathered_bytes(tensors: Iterable[Rows], world: int) -> int:
    """Return the bytes of one all-gather of each tensor."""
    return sum(tensor.gathered(world) for tensor in tensors)


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama-like model with untied embeddings, in which every linear layer of a block is adapted."""

    hidden: int
    intermediate: int
    layers: int
    kv_width: int
    vocabulary: int

    def linears(self) -> list[tuple[int, int]]:
        """Return (out_features, in_features) of one block's linear layers."""
        h, i, kv = self.hidden, self.intermediate, self.kv_width
        return [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)]


LLAMA_70B = Llama(hidden=8192, intermediate=28672, layers=80, kv_width=1024, vocabulary=128256)
LLAMA_405B = Llama(hidden=16384, intermediate=53248, layers=126, kv_width=1024, vocabulary=128256)


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one process under FSDP2 with one group per block, each block resharded after its forward.

    weights: held, in NF4 or 16 bits, with embeddings, head and norms in 16 bits.
    adapters: held: fp32 LoRA factors, their gradients and AdamW's two states.
    block: gathered for one block at a time, in addition to the bytes held.
    received: by the all-gathers of one step: every block twice, other parameters once.
    reduced: sent by the reduce-scatters of the factors' gradients, in fp32.
    """

    weights: int
    adapters: int
    block: int
    received: int
    reduced: int


def step_bytes(model: Llama, world: int, *, r: int = 16, nf4: bool = True) -> StepBytes:
    """Return the bytes that rank 0 holds and moves in one optimizer step without gradient accumulation."""
    of = nf4_rows if nf4 else dense_rows
    norm = Rows(model.hidden, 2)
    frozen = [rows for N, K in model.linears() for rows in of(N, K)] + [norm, norm]
    factors = [rows for N, K in model.linears() for rows in lora_rows(N, K, r)]
    root = [*dense_rows(model.vocabulary, model.hidden), *dense_rows(model.vocabulary, model.hidden), norm]
    block = gathered_bytes(frozen + factors, world)
    everything = 2 * model.layers * block + gathered_bytes(root, world)
    return StepBytes(
        weights=model.layers * held_bytes(frozen, world) + held_bytes(root, world),
        adapters=4 * model.layers * held_bytes(factors, world),
        block=block,
        received=everything * (world - 1) // world,
        reduced=model.layers * gathered_bytes(factors, world) * (world - 1) // world,
    )
