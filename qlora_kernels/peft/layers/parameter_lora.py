"""LoRA of parameters that a module multiplies in its own code, such as the [experts, out, in] weights of an MoE.

Names, shapes and files are those of PEFT's target_parameters. When the module reads the attribute, it gets a weight
that includes the update. A stack of experts is updated one expert at a time: F.linear(x, stack[e]) adds the low-rank
product to base(x), also over ExpertsNF4 and its fused product. All other uses see the whole updated stack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.experts_nf4 import ExpertsNF4, ExpertWeight
from ..core.adapter_selection import AdapterSelection
from ..core.adapter_tree import AdapterModules

Stored = Tensor | ExpertsNF4


class ParameterDelta(nn.Module):
    """One adapter's update of a parameter [E, N, K], or [N, K] with E = 1; scaling * B_e A_e for expert e.

    lora_A.weight [E r, K]: rows e r .. e r + r - 1 are A_e.   lora_B.weight [N, r E]: columns e, e + E, ... are B_e.
    transposed: the parameter is stored as [E, K, N].
    """

    def __init__(
        self, base: Stored, r: int, scaling: float, init: bool | str, dtype: torch.dtype, *, transposed: bool
    ) -> None:
        super().__init__()
        experts, n, k = (1, *base.shape) if len(base.shape) == 2 else base.shape
        n, k = (k, n) if transposed else (n, k)
        self.r, self.scaling, self.experts, self.transposed = r, scaling, experts, transposed
        self.lora_A = nn.Linear(k, r * experts, bias=False, device=base.device, dtype=dtype)
        self.lora_B = nn.Linear(r * experts, n, bias=False, device=base.device, dtype=dtype)
        if init == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / r)
        elif init is True:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        if init is not False:
            nn.init.zeros_(self.lora_B.weight)

    def factors(self, experts: Any) -> tuple[Tensor, Tensor]:
        """Return (A [..., r, K], B [..., N, r]) of one expert, or of several for a tensor of numbers."""
        lora_A = self.lora_A.weight.view(self.experts, self.r, -1)
        lora_B = self.lora_B.weight.view(-1, self.r, self.experts).permute(2, 0, 1)
        return lora_A[experts], lora_B[experts]

    def update(self, experts: Any) -> Tensor:
        """Return scaling * B A of these experts, [..., N, K] or transposed."""
        lora_A, lora_B = self.factors(experts)
        product = self.scaling * (lora_B @ lora_A)
        return product.transpose(-2, -1) if self.transposed else product


class ParameterUpdates(AdapterModules):
    """The updates of one parameter by all adapters; a child of the module that has the parameter.

    While merged, `merged` is the weight that the module uses.
    """

    def __init__(self, selection: AdapterSelection) -> None:
        super().__init__()
        self.selection = selection
        self.merged: list[Stored] = []  # a list keeps it out of the module tree
        self.merged_names: tuple[str, ...] = ()

    def applied(self, own: Stored) -> Any:
        """Return the value that the module reads for the parameter.   own: the parameter's own value."""
        if self.merged and self.selection.state.enabled:
            return self.merged[0]
        chosen = [cast(ParameterDelta, delta) for name, delta in self.items() if self.selection.has(name)]
        if not chosen:
            return own
        stack = UpdatedStack(own, chosen)
        lazy = len(own.shape) == 3 and not torch.compiler.is_compiling()
        return stack if lazy else stack.dense()

    def merge(self, own: Stored, names: Sequence[str], *, target: str, safe_merge: bool) -> tuple[float, float]:
        """Merge updates as AdaptedLinear.merge does, for a parameter whose own value is `own`.

        Raises ValueError if `safe_merge` is set and the merged values are not finite.
        """
        names = (*self.merged_names, *(n for n in names if n in self and n not in self.merged_names))
        weight = _dense(own).detach().float()
        with torch.no_grad():
            update = sum((cast(ParameterDelta, self[n]).update(slice(None)).float() for n in names), torch.zeros(()))
            wanted = weight + update.view_as(weight)
            if safe_merge and not torch.isfinite(wanted).all():
                raise ValueError(f"merge: the weights of adapters {list(names)} must be finite")
            dense = wanted.to(own.dtype)
            quantize = target == "nf4" or (target == "same" and isinstance(own, ExpertsNF4))
            merged: Stored = _quantized(dense, own) if quantize else dense
        self.merged, self.merged_names = [merged], names
        return float((_dense(merged).float() - wanted).norm()), float(update.norm())

    def unmerge(self) -> None:
        self.merged, self.merged_names = [], ()

    def kept_merged(self) -> Stored | None:
        """Return the merged weight, which becomes the module's own, or None if nothing is merged."""
        merged = self.merged[0] if self.merged else None
        self.unmerge()
        return merged


class UpdatedStack:
    """The weights [E, N, K] of all experts with updates. Not a tensor, but accepted by torch functions."""

    def __init__(self, own: Stored, deltas: Sequence[ParameterDelta]) -> None:
        self.own, self.deltas = own, deltas
        self.shape, self.dtype, self.device = own.shape, own.dtype, own.device
        self._dense: Tensor | None = None

    def dense(self) -> Tensor:
        """The dense updated weight, computed once."""
        if self._dense is None:
            own = _dense(self.own)
            self._dense = own + sum(d.update(slice(None)).to(own.dtype).view_as(own) for d in self.deltas)
        return self._dense

    def __getitem__(self, expert: Any) -> Any:
        if isinstance(expert, (int, Tensor)) and not (isinstance(expert, Tensor) and expert.dtype == torch.bool):
            if isinstance(expert, int) or expert.dim() == 0:
                return UpdatedExpert(self.own[expert], [(d, int(expert)) for d in self.deltas])
            own = cast(Tensor, self.own[expert])
            return own + sum(d.update(expert).to(own.dtype) for d in self.deltas)
        return self.dense()[expert]

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _call_dense(func, args, kwargs or {})


class UpdatedExpert:
    """The weight [N, K] of one expert with updates. Not a tensor, but accepted by torch functions."""

    def __init__(self, own: Tensor | ExpertWeight, parts: Sequence[tuple[ParameterDelta, int]]) -> None:
        self.own, self.parts = own, parts
        self.shape, self.dtype, self.device = own.shape, own.dtype, own.device

    def dense(self) -> Tensor:
        own = self.own.experts.dequantize(self.own.expert) if isinstance(self.own, ExpertWeight) else self.own
        return own + sum(delta.update(expert).to(own.dtype) for delta, expert in self.parts)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute F.linear with this weight, if it is stored as [N, K]."""
        y = F.linear(x, cast(Tensor, self.own), bias)
        for delta, expert in self.parts:
            lora_A, lora_B = delta.factors(expert)
            y = y + (F.linear(F.linear(x.to(lora_A.dtype), lora_A), lora_B) * delta.scaling).to(y.dtype)
        return y

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return x @ self.dense()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = args[1] if len(args) > 1 else None
        if func is F.linear and isinstance(weight, cls) and not any(delta.transposed for delta, _ in weight.parts):
            return weight.linear(args[0], args[2] if len(args) > 2 else kwargs.get("bias"))
        return _call_dense(func, args, kwargs)


def _call_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(plain(item) for item in value)
        return value.dense() if isinstance(value, (UpdatedStack, UpdatedExpert)) else value

    return func(*plain(args), **{name: plain(value) for name, value in kwargs.items()})


def _dense(stored: Stored) -> Tensor:
    return stored.dequantize() if isinstance(stored, ExpertsNF4) else stored


def _quantized(weight: Tensor, like: Stored) -> ExpertsNF4:
    if weight.dim() != 3:
        raise NotImplementedError(
            f"merge: target must be '16bit' for a parameter of shape {list(weight.shape)}, got 'nf4'"
        )
    if isinstance(like, ExpertsNF4):
        experts = ExpertsNF4.from_parameter(weight, blocksize=like.blocksize, double_quant=like.double_quant)
        experts.store_as(like)
        return experts
    return ExpertsNF4.from_parameter(weight)
