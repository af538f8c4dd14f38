"""ExpertsNF4: the weights of a mixture of experts, [experts, out_features, in_features], in NF4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..format import nf4
from ..format.double_quant import NESTED_BLOCKSIZE, dynamic_map
from ..format.quant_state import QuantState, n_blocks
from ..ops.dequantize_nf4 import dequantize_nf4
from ..ops.linear_nf4 import linear_nf4
from ..ops.quantize_nf4 import quantize_nf4
from .quantized_weight import CONSTANTS, TENSORS, QuantizedWeight, assigns
from .read_only import ReadOnlyTensor


class ExpertsNF4(QuantizedWeight):
    """A replacement for a parameter `w` of shape [E, N, K] in a module that multiplies by `w[e]`.

    Each expert is quantized separately and has its own blocks and second-level statistics:
    `packed` uint8 [E, (N * K + 1) // 2]; `absmax` fp32 [E, n_blocks], or `absmax_q` uint8 [E, n_blocks], `absmax_scale`
    fp32 [E, ceil(n_blocks / 256)] and `absmax_offset` fp32 [E].

    `experts[e]` with an int is an `ExpertWeight`: torch.nn.functional.linear(x, experts[e]) runs fused, without a
    dequantized weight, and every other function gets the dequantized [N, K]. `experts[ids]` with a tensor is the
    dequantized stack. The state dict holds the buffers under their own names.
    """

    def __init__(self, packed: Sequence[Tensor], states: Sequence[QuantState]) -> None:
        """Stack the quantized weights of the experts.

        packed, states: one of each per expert, as returned by `quantize_nf4`, of equal shapes and blocksizes.
        """
        super().__init__()
        first = states[0]
        self.num_experts = len(states)
        self.out_features, self.in_features = first.shape
        self.blocksize = first.blocksize
        self.weight_dtype = first.dtype
        stacked: dict[str, Tensor | None] = {"packed": torch.stack([p.reshape(-1) for p in packed])}
        for name, tensors in zip(CONSTANTS, zip(*(s.constants for s in states), strict=True), strict=True):
            present = [t for t in tensors if t is not None]
            stacked[name] = torch.stack(present) if present else None
        self._set_tensors(stacked, persistent=True)

    @classmethod
    def from_parameter(
        cls, weight: Tensor, *, blocksize: int = nf4.DEFAULT_BLOCKSIZE, double_quant: bool = True
    ) -> ExpertsNF4:
        """Quantize [E, N, K], one expert at a time. Raises ValueError for other shapes."""
        if weight.dim() != 3 or weight.shape[0] == 0:
            raise ValueError(f"ExpertsNF4: weight must have shape [E >= 1, N, K], got {tuple(weight.shape)}")
        quantized = [quantize_nf4(expert, blocksize, double_quant) for expert in weight.detach()]
        return cls([packed for packed, _ in quantized], [state for _, state in quantized])

    @classmethod
    def empty(
        cls,
        num_experts: int,
        out_features: int,
        in_features: int,
        blocksize: int = nf4.DEFAULT_BLOCKSIZE,
        double_quant: bool = True,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ExpertsNF4:
        """Return experts with uninitialized buffers.   dtype: of the weight before quantization."""
        blocks = n_blocks(out_features * in_features, blocksize)
        state = QuantState(
            torch.Size((out_features, in_features)),
            dtype or torch.get_default_dtype(),
            blocksize,
            absmax=None if double_quant else torch.empty(blocks, device=device),
            absmax_q=torch.empty(blocks, dtype=torch.uint8, device=device) if double_quant else None,
            absmax_scale=torch.empty(n_blocks(blocks, NESTED_BLOCKSIZE), device=device) if double_quant else None,
            absmax_offset=torch.empty((), device=device) if double_quant else None,
        )
        packed = torch.empty((out_features * in_features + 1) // 2, dtype=torch.uint8, device=device)
        return cls([packed] * num_experts, [state] * num_experts)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int, int], blocksize: int, dtype: torch.dtype
    ) -> ExpertsNF4:
        """Return experts over existing tensors, without copies.

        tensors: by the names of the buffers.   shape: [E, N, K].   dtype: of the weight before quantization.
        Raises ValueError, naming tensors of another shape or dtype.
        """
        double_quant = "absmax_q" in tensors
        experts = cls.empty(*shape, blocksize, double_quant, dtype=dtype, device="meta")
        values = {name: tensors.get(name) for name in TENSORS}
        for name, value in values.items():
            expected, got = (None if t is None else (*t.shape, t.dtype) for t in (experts._buffers[name], value))
            if got != expected:
                raise ValueError(f"ExpertsNF4: {name} must have the shape and dtype {expected}, got {got}")
        experts._set_tensors(values, persistent=True)
        return experts

    @property
    def shape(self) -> torch.Size:
        """The shape [E, N, K] of all experts' weights."""
        return torch.Size((self.num_experts, self.out_features, self.in_features))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight before quantization."""
        return self.weight_dtype

    @property
    def device(self) -> torch.device:
        """The device of the packed indices."""
        return self.stored_device

    def quant_state(self, expert: int) -> QuantState:
        """Return the shape, dtype and constants of one expert."""
        constants = (self.absmax, self.absmax_q, self.absmax_scale, self.absmax_offset)
        shape = torch.Size((self.out_features, self.in_features))
        own = [None if t is None else t[expert] for t in constants]
        return QuantState(shape, self.weight_dtype, self.blocksize, *own)

    def dequantize(self, expert: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dequantized [N, K] of one expert, or [E, N, K] of all for None."""
        if expert is not None:
            return dequantize_nf4(self.packed[expert], self.quant_state(expert), dtype)
        return torch.stack([self.dequantize(e, dtype) for e in range(self.num_experts)])

    def forward(self, x: Tensor, expert: int, bias: Tensor | None = None) -> Tensor:
        """y = x @ W_expert.T + bias.   x: [..., K];  y: [..., N] of x.dtype. Differentiable in x and bias."""
        return linear_nf4(x, self.packed[expert], self.quant_state(expert), bias)

    def __getitem__(self, expert: int | Tensor) -> ExpertWeight | Tensor:
        if isinstance(expert, Tensor) and expert.dim() > 0:
            return self._dequantized(expert)
        number = int(expert)
        if not -self.num_experts <= number < self.num_experts:
            raise IndexError(f"ExpertsNF4: expert must lie in [0, {self.num_experts}), got {number}")
        return ExpertWeight(self, number)

    def _dequantized(self, ids: Tensor) -> Tensor:
        """Return the dequantized weights of experts `ids`, [*ids.shape, N, K], by one decode.

        The host does not wait for the device to learn the ids, so that this can be captured in a CUDA graph.
        """
        N, K = self.out_features, self.in_features
        if ids.numel() == 0:
            return torch.empty((*ids.shape, N, K), dtype=self.weight_dtype, device=self.device)
        if N * K % self.blocksize:  # the experts' blocks do not line up when they lie behind each other
            unique, position = torch.unique(ids, return_inverse=True)
            return torch.stack([self.dequantize(e) for e in unique.tolist()])[position]
        few = ids.numel() < self.num_experts
        chosen = ids.reshape(-1) if few else torch.arange(self.num_experts, device=ids.device)
        state = QuantState((len(chosen) * N, K), self.weight_dtype, self.blocksize, self._absmax_of(chosen))
        stack = dequantize_nf4(self.packed[chosen].reshape(-1), state).view(len(chosen), N, K)
        return stack.view(*ids.shape, N, K) if few else stack[ids]

    def _absmax_of(self, ids: Tensor) -> Tensor:
        """Return the constants of experts `ids` [n], fp32 [n * n_blocks], decoded if they are stored in 8 bits."""
        if self.absmax is not None:
            return self.absmax[ids].reshape(-1)
        assert self.absmax_q is not None
        assert self.absmax_scale is not None
        assert self.absmax_offset is not None
        q = self.absmax_q[ids]
        scale = self.absmax_scale[ids].repeat_interleave(NESTED_BLOCKSIZE, dim=1)[:, : q.shape[1]]
        return (_dynamic_map(q.device)[q.long()] * scale + self.absmax_offset[ids, None]).reshape(-1)

    def __len__(self) -> int:
        return self.num_experts

    def extra_repr(self) -> str:
        """Return the sizes and the format, for repr()."""
        return (
            f"experts={self.num_experts}, out_features={self.out_features}, in_features={self.in_features}, "
            f"blocksize={self.blocksize}"
        )

    def _flat_shape(self, name: str) -> tuple[int, ...]:
        # Flat, so that the bytes can be split evenly over more processes than there are experts.
        return (self.num_experts,) if name == "absmax_offset" else (self.num_experts, -1)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._save_rest(destination, prefix, keep_vars) and self.in_parameters:
            for name, tensor in zip(TENSORS, self._tensors(), strict=True):
                if tensor is not None:
                    destination[prefix + name] = tensor if keep_vars else tensor.detach()

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
        report = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if not self.in_parameters:
            nn.Module._load_from_state_dict(self, state_dict, prefix, *report)
            return
        found = {name: state_dict[prefix + name] for name in TENSORS if prefix + name in state_dict}
        self._load_rest(state_dict, {prefix + name for name in found}, prefix, *report)
        if missing := [name for name in TENSORS if self._stored(name) is not None and name not in found]:
            missing_keys += [prefix + name for name in missing]
            return
        try:
            values = {name: found.get(name) for name in TENSORS}
            self._load_tensors(prefix, values, assign=assigns(local_metadata))
        except ValueError as error:
            error_msgs.append(str(error))


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    """Return the map of 8-bit constants, copied to each device once."""
    return dynamic_map(device)


def is_expert_stack(owner: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether `parameter` is an [experts, out, in] weight of two or more experts.

    Other three-dimensional parameters are weights of convolutions and nn.Bilinear, what a parametrization computes such
    weights of (weight_norm), and embeddings that broadcast over the batch, as the class token and the positions of a
    vision transformer, [1, tokens, hidden].
    """
    if parameter.dim() != 3 or not parameter.is_floating_point() or parameter.shape[0] < 2:
        return False
    return not isinstance(owner, (nn.modules.conv._ConvNd, nn.Bilinear, ParametrizationList))


class ExpertWeight:
    """One expert's weight [N, K], which torch functions accept in place of a tensor."""

    def __init__(self, experts: ExpertsNF4, expert: int) -> None:
        self.experts = experts
        self.expert = expert

    @property
    def shape(self) -> torch.Size:
        """The shape [N, K] of one expert's weight."""
        return self.experts.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight before quantization."""
        return self.experts.dtype

    @property
    def device(self) -> torch.device:
        """The device of the packed indices."""
        return self.experts.device

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run F.linear with this weight fused; give every other function the dequantized weight."""
        kwargs = kwargs or {}
        if func is nn.functional.linear and len(args) >= 2 and isinstance(args[1], cls):
            x, weight = args[:2]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return weight.experts(x, weight.expert, bias)

        def dense(value: Any) -> Any:
            return ReadOnlyTensor.of(value.experts.dequantize(value.expert)) if isinstance(value, cls) else value

        return func(*map(dense, args), **{name: dense(value) for name, value in kwargs.items()})
