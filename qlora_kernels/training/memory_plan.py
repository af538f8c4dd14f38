"""The memory of a fine-tuning run, computed from the shapes of a model and the settings of the run.

The parts are bytes of tensors, as torch.autograd saves them for a decoder of transformers with rotary embedding,
RMSNorm and gated MLPs, under scaled_dot_product_attention with a kernel that keeps no scores. N is the number of tokens
in memory at one time:

    weights      NF4 layers with their constants, and everything else in the compute dtype
    adapters     fp32 LoRA factors, r (in + out) values for each layer
    gradients    the same again
    optimizer    two fp32 moments for each trained value
    activations  what the forward pass keeps for the backward pass, N times the sum of:
                     each norm: its input in fp32, a scale, its output (of the first norm, the output alone)
                     attention: q, k, v, the output, and a logarithm in fp32 for each head
                     MLP: 4 intermediate vectors (gate, its activation, up, their product)
                     each adapted layer: x A^T, r values
                 with gradient checkpointing: the hidden state of each layer, and all of the above for one layer
    workspace    gradients of one layer's activations and a decoded weight, or a chunk of logits, whichever is larger

For models with other norms or MLPs the same terms are an estimate. What torch's allocator and the driver take beside
tensors is in none of the parts; CONTEXT_BYTES is set aside for it on a GPU.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ..rounding import cdiv

CONTEXT_BYTES = 700_000_000
"""Bytes reserved on a GPU for the driver's context, the code of kernels and fragmentation of the allocator."""
LOGITS_CHUNK = 256
"""Number of tokens whose logits are in memory at one time (`ChunkedLoss`)."""
LOGITS_SCRATCH = 32
"""Number of rows of fp32 logits in addition to them."""
_FP32 = 4
_BLOCKS_PER_SCALE = 256


class PlanError(ValueError):
    """The model has a structure or a configuration that the formula does not cover."""


@dataclass(frozen=True)
class RunSettings:
    """The settings on which the memory of a run depends, in addition to the model.

    r: rank of each LoRA update.   seq_len: tokens of an example.   micro_batch: examples in memory at one time.
    blocksize, double_quant: of the NF4 weights.   itemsize: bytes of a value in the compute dtype.
    checkpointing: whether activations are recomputed layer by layer.   paged: whether optimizer states are pageable.
    """

    r: int = 16
    seq_len: int = 256
    micro_batch: int = 4
    blocksize: int = 64
    double_quant: bool = True
    itemsize: int = 2
    checkpointing: bool = False
    paged: bool = False

    @property
    def tokens(self) -> int:
        """Return the number of tokens in memory at one time."""
        return self.seq_len * self.micro_batch


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part.   paged: bytes of the optimizer that may leave the device."""

    nf4: int
    dense: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    paged: int = 0

    @property
    def weights(self) -> int:
        """Return the bytes of the base model."""
        return self.nf4 + self.dense

    @property
    def total(self) -> int:
        """Return the bytes of all parts that the device must hold at once."""
        return int(sum(asdict(self).values()) - 2 * self.paged)

    def fits(self, memory: int) -> bool:
        """Return whether a GPU with so many bytes of memory holds the run."""
        return self.total + CONTEXT_BYTES <= memory


@dataclass(frozen=True)
class DecoderSizes:
    """The sizes of a decoder on which its memory depends.

    quantized: number of values of each quantized weight.   dense_values: of all other parameters, tied ones once.
    buffer_bytes: of all buffers.   adapted: in + out features of each layer with an update.
    norms: (width, rows for each token, whether a linear layer reads its output) of each norm but the last.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    gated: bool
    quantized: tuple[int, ...]
    dense_values: int
    buffer_bytes: int
    adapted: tuple[int, ...]
    norms: tuple[tuple[int, int, bool], ...]

    @classmethod
    def of(cls, model: nn.Module, quantized: Collection[str], adapted: Collection[str]) -> DecoderSizes:
        """Return the sizes of a transformers decoder, whose weights may be on the meta device.

        quantized: names of the layers that are in NF4.   adapted: names of those that get a LoRA update.
        Raises PlanError for mixtures of experts and for a configuration without the sizes of a decoder.
        """
        config = _text_config(model)
        for field in ("num_local_experts", "num_experts", "n_routed_experts"):
            if (getattr(config, field, None) or 0) > 1:
                raise PlanError(f"plan: the model must be a dense decoder, got a mixture of experts ({field})")
        hidden, layers = _size(config, "hidden_size"), _size(config, "num_hidden_layers")
        heads = _size(config, "num_attention_heads")
        modules = dict(model.named_modules())
        packed = {id(_weight(modules[name])): _weight(modules[name]).numel() for name in quantized}
        intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
        wide = sum(intermediate == max(_weight(modules[name]).shape) for name in adapted)
        norms = [(name, m) for name, m in modules.items() if type(m).__name__.endswith(("RMSNorm", "LayerNorm"))]
        return cls(
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            intermediate=intermediate,
            vocabulary=_size(config, "vocab_size"),
            gated=wide >= 3 * layers,
            quantized=tuple(packed.values()),
            dense_values=sum(p.numel() for p in model.parameters() if id(p) not in packed),
            buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
            adapted=tuple(sum(_weight(modules[name]).shape) for name in adapted),
            norms=tuple(_norm(name, _weight(m).numel(), hidden, heads, config) for name, m in norms[:-1]),
        )

    def plan(self, settings: RunSettings) -> MemoryPlan:
        """Return the memory of a run with these settings."""
        trained = settings.r * sum(self.adapted)
        moments = 2 * _FP32 * trained
        return MemoryPlan(
            nf4=sum(_nf4_bytes(values, settings) for values in self.quantized),
            dense=self.dense_values * settings.itemsize + self.buffer_bytes,
            adapters=_FP32 * trained,
            gradients=_FP32 * trained,
            optimizer=moments,
            activations=self._activations(settings),
            workspace=self._workspace(settings),
            paged=moments if settings.paged else 0,
        )

    def _activations(self, settings: RunSettings) -> int:
        item, tokens = settings.itemsize, settings.tokens
        rotary = 2 * item * self.head_dim * settings.seq_len
        last = (_FP32 + 2 * item) * self.hidden + _FP32  # norm, hidden state and its gradient
        last += 8 + _FP32  # label and logarithm of the loss
        layers = self._of_layers(settings)
        if settings.checkpointing:
            layers = item * self.hidden * self.layers + cdiv(layers, self.layers)
        return rotary + tokens * (last + layers)

    def _of_layers(self, settings: RunSettings) -> int:
        """Return bytes per token of all layers."""
        item = settings.itemsize
        norms = sum(
            rows * (_FP32 * width + _FP32) + (item * rows * width if read else 0) for width, rows, read in self.norms
        )
        norms -= _FP32 * self.hidden + _FP32  # of the first norm: no gradient reaches the frozen embedding below it
        attention = 2 * item * (self.heads + self.kv_heads) * self.head_dim + _FP32 * self.heads
        mlp = (4 if self.gated else 2) * item * self.intermediate
        return norms + self.layers * (attention + mlp) + item * settings.r * len(self.adapted)

    def _workspace(self, settings: RunSettings) -> int:
        item, tokens = settings.itemsize, settings.tokens
        decoded = item * max(self.quantized)
        gradients = tokens * (3 * item * self.intermediate + 3 * _FP32 * self.hidden)
        logits = self.vocabulary * (item * min(tokens, LOGITS_CHUNK) + _FP32 * LOGITS_SCRATCH)
        return max(decoded + gradients, logits)


def _norm(name: str, width: int, hidden: int, heads: int, config: Any) -> tuple[int, int, bool]:
    """Return (width, rows per token, whether a linear layer reads its output) of a norm."""
    if width == hidden:
        return width, 1, True
    of_keys = "k_norm" in name or "key" in name
    rows = (getattr(config, "num_key_value_heads", None) or heads) if of_keys else heads
    return width, rows, False


def _nf4_bytes(values: int, settings: RunSettings) -> int:
    """Return the bytes of a packed weight and its constants, as QuantState.nbytes counts them."""
    blocks = cdiv(values, settings.blocksize)
    packed = cdiv(values, 2)
    if not settings.double_quant:
        return packed + _FP32 * blocks
    return packed + blocks + _FP32 * cdiv(blocks, _BLOCKS_PER_SCALE) + _FP32


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _size(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise PlanError(f"plan: config.json must give {name} as a positive integer, got {value!r}")
    return value
