"""LinearNF4: a drop-in for a frozen nn.Linear whose weight is kept in NF4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..format import bnb_layout, nf4
from ..format.quant_state import FLOAT_DTYPES, QuantState, n_blocks
from ..ops import linear_nf4_lora_merged  # noqa: F401, registers the op
from ..ops.checks import check_blocksize, check_last_dim
from ..ops.dequantize_nf4 import dequantize_nf4
from ..ops.linear_nf4_lora import seed_for
from ..ops.linear_nf4_lora_group import call_group
from ..ops.operands import GroupLoRA, LoRA, MultiLoRA, Weight
from ..ops.quantize_nf4 import quantize_nf4
from .quantized_weight import CONSTANTS, QuantizedWeight, assigns
from .read_only import ReadOnlyTensor


class LinearNF4(QuantizedWeight):
    """y = x W^T + bias with W [out_features, in_features] frozen in NF4.

    in_features, out_features, bias: as for nn.Linear.   blocksize: weights per absmax.   double_quant: 8-bit constants.
    compute_dtype: x is cast to it for the product, and y is cast back to x's dtype; None computes in x's dtype. Under
    autocast the product and y have autocast's dtype, as for nn.Linear.

    Buffers: `packed` uint8 [(N * K + 1) // 2, 1]; `absmax` fp32 [n_blocks], or `absmax_q`, `absmax_scale` and
    `absmax_offset`, which stay fp32 under `.to(dtype)`. Under DistributedDataParallel and FSDP2 they are frozen
    parameters (quantized_weight.py). The bias is an ordinary parameter. A new layer holds zeros until a checkpoint is
    loaded; `from_linear` quantizes an existing layer.

    The state dict holds plain tensors under bitsandbytes' keys (format/bnb_layout.py). Strict loading works in both
    directions. The blocksize and kind of constants of a checkpoint are adopted, and a dense `weight` is quantized while
    it is loaded. `train()`, `eval()`, `state_dict()` and forward never change a byte of the weight.

    merge_on_decode: whether forward_lora adds the update to W while it is decoded, before the one rounding
    (`set_merge_on_decode`). Not a part of the state dict.
    Raises TypeError or ValueError, naming the argument, for an unknown compute_dtype, blocksize or shape.
    """

    merge_on_decode = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocksize: int = nf4.DEFAULT_BLOCKSIZE,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_blocksize("LinearNF4", blocksize)
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not hasattr(type(size), "__index__"):
                raise TypeError(f"LinearNF4: {name} must be an int, got {size!r}")
            if size < 0:
                raise ValueError(f"LinearNF4: {name} must be at least 0, got {size}")
        if compute_dtype is not None and compute_dtype not in FLOAT_DTYPES:
            raise TypeError(f"LinearNF4: compute_dtype must be one of {FLOAT_DTYPES} or None, got {compute_dtype}")
        self.in_features = in_features
        self.out_features = out_features
        self.blocksize = blocksize
        self.compute_dtype = compute_dtype
        self.dense_class: type[nn.Module] = nn.Linear  # or Conv1D: the class of the layer that this one replaces
        self.weight_dtype = dtype or torch.get_default_dtype()
        numel = in_features * out_features
        blocks = n_blocks(numel, blocksize)
        self.set_weight(
            torch.full(((numel + 1) // 2, 1), nf4.ZERO_INDEX * 0x11, dtype=torch.uint8, device=device),
            QuantState(
                torch.Size((out_features, in_features)),
                self.weight_dtype,
                blocksize,
                absmax=None if double_quant else torch.zeros(blocks, device=device),
                absmax_q=torch.zeros(blocks, dtype=torch.uint8, device=device) if double_quant else None,
                absmax_scale=torch.zeros(n_blocks(blocks, 256), device=device) if double_quant else None,
                absmax_offset=torch.zeros((), device=device) if double_quant else None,
            ),
        )
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        blocksize: int = nf4.DEFAULT_BLOCKSIZE,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> LinearNF4:
        """Quantize an nn.Linear, or transformers' Conv1D (whose weight is stored transposed).

        The new layer uses the same bias parameter, not a copy. Raises TypeError for other modules.
        """
        quantized = quantize_nf4(dense_weight(linear), blocksize, double_quant)
        return cls.from_quantized(*quantized, like=linear, compute_dtype=compute_dtype)

    @classmethod
    def from_quantized(
        cls, packed: Tensor, state: QuantState, *, like: nn.Module, compute_dtype: torch.dtype | None = None
    ) -> LinearNF4:
        """Return a layer with the quantized weight (packed, state), as from `quantize_nf4`, that replaces `like`.

        like: the nn.Linear or Conv1D whose bias parameter is used; its weight is not read.
        """
        out_features, in_features = state.shape
        layer = cls(in_features, out_features, bias=False, compute_dtype=compute_dtype, device="meta")
        layer.set_weight(packed, state)
        layer.bias = cast(nn.Parameter | None, like.bias)
        layer.dense_class = type(like) if is_conv1d(like) else nn.Linear
        layer.train(like.training)
        return layer

    @property
    def quant_state(self) -> QuantState:
        """Return the shape, dtype and constants of the weight."""
        shape = torch.Size((self.out_features, self.in_features))
        constants = (self.absmax, self.absmax_q, self.absmax_scale, self.absmax_offset)
        return QuantState(shape, self.weight_dtype, self.blocksize, *constants)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, computed on each access; meant for code that reads the weight, not for fast products.

        It is read-only: a write, which could not change the packed weight, raises RuntimeError.
        """
        return ReadOnlyTensor.of(self.dequantize())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W [out_features, in_features] in `dtype`; None is weight_dtype, the dtype before quantization or last
        cast.
        """
        return dequantize_nf4(self.packed, self.quant_state, dtype)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a dense layer with this layer's dequantized weight and its bias parameter: the reverse of from_linear.

        dtype: of the weight, which is frozen; None = weight_dtype.
        Returns an nn.Linear, or a Conv1D if the layer was made from one.
        """
        weight = self.dequantize(dtype)
        if self.dense_class is nn.Linear:
            dense: Any = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        else:
            dense = cast(Any, self.dense_class)(self.out_features, self.in_features)
            weight = weight.T.contiguous()
        dense.weight = nn.Parameter(weight, requires_grad=False)
        dense.register_parameter("bias", self.bias)
        return cast(nn.Module, dense.train(self.training))

    # Shapes: x [..., K] and y [..., N], with K = in_features and N = out_features. Each forward casts x to the dtype of
    # the product, calls one op, which also defines the backward pass, and casts y to the dtype of the result.

    def forward(self, x: Tensor) -> Tensor:
        """Compute y [..., out_features] from x [..., in_features]."""
        x, dtype = self._product_input(x)
        y: Tensor = torch.ops.qlora_kernels.linear_nf4.default(x, *self._operand, self.bias)
        return y if y.dtype == dtype else y.to(dtype)

    def forward_lora(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float = 0.0) -> Tensor:
        """Compute y = x W^T + bias + scaling * (dropout(x) lora_A^T) lora_B^T in one op, forward and backward.

        lora_A: [r, in_features], lora_B: [out_features, r].   dropout_p: the caller passes 0 outside training.
        Raises ValueError for dropout_p above 0 with merge_on_decode.
        """
        x, dtype = self._product_input(x)
        if self.merge_on_decode:
            self._check_mergeable(dropout_p)
            merged = LoRA(lora_A, lora_B, None, scaling, 0.0)
            y: Tensor = torch.ops.qlora_kernels.linear_nf4_lora_merged.default(x, *self._operand, self.bias, *merged)
            return y if y.dtype == dtype else y.to(dtype)
        lora = LoRA(lora_A, lora_B, seed_for(dropout_p, x.device), scaling, dropout_p)
        y = torch.ops.qlora_kernels.linear_nf4_lora.default(x, *self._operand, self.bias, *lora)[0]
        return y if y.dtype == dtype else y.to(dtype)

    def forward_multi_lora(
        self, x: Tensor, lora_A: Tensor, lora_B: Tensor, scalings: Tensor, adapter: Tensor, dropout_p: float = 0.0
    ) -> Tensor:
        """Compute forward_lora with a separate adapter for each row of x.

        adapter: int64, one number for each row of x as a matrix, -1 for none.
        lora_A: [E, r, in_features], lora_B: [E, out_features, r], smaller ranks padded with zeros.
        scalings: fp32 [E].
        Raises NotImplementedError with merge_on_decode, because one weight cannot hold the updates of all rows.
        """
        if self.merge_on_decode:
            raise NotImplementedError(
                "LinearNF4: merge_on_decode must be off where each row has an adapter of its own (adapter_names): one "
                "weight cannot hold the updates of all rows; call set_merge_on_decode(model, False)"
            )
        x, dtype = self._product_input(x)
        lora = MultiLoRA(lora_A, lora_B, scalings, adapter, seed_for(dropout_p, x.device), dropout_p)
        y: Tensor = torch.ops.qlora_kernels.linear_nf4_multi_lora.default(x, *self._operand, self.bias, *lora)[0]
        return y if y.dtype == dtype else y.to(dtype)

    @staticmethod
    def forward_lora_group(
        layers: Sequence[LinearNF4],
        x: Tensor,
        updates: Sequence[tuple[Tensor, Tensor, float]],
        dropout_p: float = 0.0,
    ) -> list[Tensor]:
        """Compute each layer's forward_lora on the same x, as one op with one dropout mask, forward and backward.

        layers: with equal in_features and compute_dtype; their biases are constants.
        updates: (lora_A, lora_B, scaling) of each layer.
        Returns the y of each layer.
        """
        if any(layer.merge_on_decode for layer in layers):
            pairs = zip(layers, updates, strict=True)
            return [layer.forward_lora(x, *update, dropout_p) for layer, update in pairs]
        x, dtype = layers[0]._product_input(x)
        lora_A, lora_B, scalings = zip(*updates, strict=True)
        lora = GroupLoRA(torch.cat(lora_A), lora_B, seed_for(dropout_p, x.device), scalings, dropout_p)
        ys = call_group(x, [layer._operand for layer in layers], [layer.bias for layer in layers], lora)
        return [y if y.dtype == dtype else y.to(dtype) for y in ys]

    def set_weight(self, packed: Tensor, state: QuantState) -> None:
        """Replace the weight by the quantized weight (packed, state) of the same shape, without a copy."""
        self.blocksize = state.blocksize
        self.weight_dtype = state.dtype
        # Not persistent: _save_to_state_dict writes them under their checkpoint names.
        self._set_tensors({"packed": packed, **dict(zip(CONSTANTS, state.constants, strict=True))}, persistent=False)

    def extra_repr(self) -> str:
        """Return the sizes, as nn.Linear does, and the format, for repr()."""
        kind = "double-quantized" if self.double_quant else "fp32 absmax"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"blocksize={self.blocksize}, {kind}, compute_dtype={self.compute_dtype}"
        )

    def _check_mergeable(self, dropout_p: float) -> None:
        if dropout_p > 0:
            raise ValueError(
                f"LinearNF4: dropout_p must be 0 with merge_on_decode, got {dropout_p}: dropout makes the update "
                "another one for each row of x; set lora_dropout=0, or call set_merge_on_decode(model, False)"
            )

    @property
    def _operand(self) -> Weight:
        return Weight._make((*self._tensors(), self.blocksize, self.out_features, self.in_features))

    def _product_input(self, x: Tensor) -> tuple[Tensor, torch.dtype]:
        """Return (x in the dtype of the product, the dtype of the result).

        Casts are skipped where the dtype is already right, because a call of `.to` takes a microsecond.
        Raises TypeError unless x is a tensor of floats, and ValueError for another K.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"LinearNF4: x must be a tensor, got {type(x).__name__}")
        check_last_dim("LinearNF4", "x", x, self.in_features, "in_features")
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # is_autocast_enabled rejects the meta device
            compute = result = torch.get_autocast_dtype(x.device.type)
        else:
            compute, result = self.compute_dtype or x.dtype, x.dtype
        if x.dtype == compute:
            return x, result
        if not x.is_floating_point():  # y would be cast back to integers, or lose its imaginary part
            raise TypeError(f"LinearNF4: x must be of a floating-point dtype, got {x.dtype}; cast it with x.to(dtype)")
        return x.to(compute), result

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self._save_rest(destination, prefix, keep_vars):
            return
        destination[prefix + "weight"] = self.packed if keep_vars else self.packed.detach()
        for suffix, tensor in bnb_layout.encode(self.quant_state).items():
            destination[f"{prefix}weight.{suffix}"] = tensor

    def _load_format(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = prefix + "weight"
        found = {s: state_dict[f"{name}.{s}"] for s in bnb_layout.SUFFIXES if f"{name}.{s}" in state_dict}
        taken = {name, *(f"{name}.{suffix}" for suffix in found)}
        self._load_rest(state_dict, taken, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if name not in state_dict:
            missing_keys.append(name)
            return
        try:
            self._load_weight(name, state_dict[name], found, assign=assigns(local_metadata))
        except (ValueError, TypeError) as error:
            error_msgs.append(str(error))

    def _load_weight(self, name: str, weight: Tensor, found: dict[str, Tensor], *, assign: bool) -> None:
        shape = (self.out_features, self.in_features)
        device = self._device_of_loaded(name, weight, assign=assign)
        if not found and weight.is_floating_point():
            if tuple(weight.shape) != shape:
                raise ValueError(f"{name}: dense weight must have shape {shape}, got {tuple(weight.shape)}")
            self.set_weight(*quantize_nf4(weight.to(device), self.blocksize, self.double_quant))
            return
        state = bnb_layout.decode(name, found)
        if tuple(state.shape) != shape:
            raise ValueError(f"{name}: quantized weight must have shape {shape}, got {tuple(state.shape)}")
        packed = weight.reshape(-1).view(torch.uint8).reshape(-1, 1)
        if packed.numel() != (state.numel + 1) // 2:
            raise ValueError(f"{name}: must hold {(state.numel + 1) // 2} packed bytes, got {packed.numel()}")
        state = state.to(device)
        if not assign:
            copies = [None if t is None else t.detach().clone() for t in state.constants]
            state = QuantState(state.shape, state.dtype, state.blocksize, *copies)
        self.set_weight(packed.detach().to(device, copy=not assign), state)


def dense_weight(linear: nn.Module) -> Tensor:
    """Return W [out_features, in_features] of an nn.Linear or transformers' Conv1D. Raises TypeError for other
    modules.
    """
    if isinstance(linear, nn.Linear):
        return linear.weight
    if is_conv1d(linear):
        return cast(Tensor, linear.weight).T
    raise TypeError(f"from_linear: linear must be an nn.Linear or a transformers Conv1D, got {type(linear).__name__}")


def is_nn_linear(module: nn.Module) -> bool:
    """Whether `module` is an nn.Linear or Falcon's equivalent subclass; other subclasses may compute something else."""
    kind = type(module)
    falcons = kind.__name__ == "FalconLinear" and kind.__module__ == "transformers.models.falcon.modeling_falcon"
    return kind is nn.Linear or falcons


def is_conv1d(module: nn.Module | type[nn.Module]) -> bool:
    """Whether `module` is GPT-2's Conv1D or its class, recognized by name so that transformers is not imported."""
    kind = module if isinstance(module, type) else type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
