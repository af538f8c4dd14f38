"""Tensor parallelism for LinearNF4 with and without LoRA: plans for torch's parallelize_module.

    plan = {"layers.*.mlp.up_proj": ColwiseNF4(), "layers.*.mlp.down_proj": RowwiseNF4()}
    parallelize_module(model, mesh["tp"], plan)       # after get_peft_model, before make_shardable and fully_shard

A column-parallel layer takes the whole x and returns its part of y. A row-parallel layer takes a part of x and returns
the whole y, summed over the processes. Each part has a range of the whole weight's NF4 bytes. LoRA: the factor on the
sharded side is sharded; the other one is whole in every process, and its gradient is summed. The bias of a
column-parallel layer is sharded, that of a row-parallel layer is whole and added after the sum. All of these are
DTensors, so that save_pretrained, norms and optimizers use whole tensors.

Layers outside the plan, embeddings, norms and their adapters are whole in every process. Their gradients are equal in
all of them, because x and the gradient of x are.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from ..format.quant_state import QuantState
from ..nn.linear_nf4 import LinearNF4
from ..nn.quantized_weight import is_sharded
from ..peft.layers.adapted_linear import AdaptedLinear
from ..peft.layers.overridden_module import plain_class
from ..peft.methods.lora_layers import LoraLinear

NESTED_BLOCKSIZE = 256


class ParallelLinearNF4(LinearNF4):
    """One process's part of a LinearNF4, made in place by ColwiseNF4 and RowwiseNF4."""

    mesh: DeviceMesh
    cuts_rows: bool
    """Whether the weight's rows are split, so that y is a part, or its columns, so that x is a part."""

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias that the op adds: of split rows this process's part, of split columns none.

        While FSDP2 has split the bias further, it is that DTensor, which FSDP2 reads here.
        """
        own: Any = self._parameters.get("bias")
        if own is None or own.device_mesh != self.mesh:
            return own  # type: ignore[no-any-return]
        return own.to_local() if self.cuts_rows else None

    def forward(self, x: Tensor) -> Tensor:
        """Compute y [..., N] or a part of it from x [..., K] or a part of it."""
        return self._leave(super().forward(self._enter(x)))

    def forward_lora(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float = 0.0) -> Tensor:
        """Compute LinearNF4.forward_lora.   lora_A, lora_B: DTensors, sharded as the weight is.

        Raises NotImplementedError for dropout_p other than 0.
        """
        if dropout_p:
            raise NotImplementedError(f"ParallelLinearNF4: dropout_p must be 0, got {dropout_p}")
        local = [self._local_factor(factor) for factor in (lora_A, lora_B)]
        return self._leave(super().forward_lora(self._enter(x), local[0], local[1], scaling))

    def forward_multi_lora(self, *arguments: Any, **options: Any) -> Tensor:
        """Raise NotImplementedError: adapters per row are not supported."""
        raise NotImplementedError("ParallelLinearNF4: adapter_names must not be given under tensor parallelism")

    @staticmethod
    def forward_lora_group(*arguments: Any, **options: Any) -> list[Tensor]:
        """Raise NotImplementedError: layers fused on one x are not supported."""
        raise NotImplementedError("ParallelLinearNF4: layers must not be fused; call unfuse_shared_input first")

    def _enter(self, x: Tensor) -> Tensor:
        return _SumGradient.apply(x, self.mesh) if self.cuts_rows else x  # type: ignore[no-untyped-call]

    def _leave(self, y: Tensor) -> Tensor:
        if self.cuts_rows:
            return y
        y = _Sum.apply(y, self.mesh)  # type: ignore[no-untyped-call]
        bias: Any = self._parameters.get("bias")
        return y if bias is None else y + bias.to_local().to(y.dtype)

    def _local_factor(self, factor: Any) -> Tensor:
        if not is_sharded(factor):
            raise TypeError("ParallelLinearNF4: lora_A and lora_B must be DTensors; add adapters before the plan")
        local: Tensor = factor.to_local()
        if any(placement.is_shard() for placement in factor.placements):
            return local
        return _SumGradient.apply(local, self.mesh)  # type: ignore[no-untyped-call, no-any-return]


class _StyleNF4(ParallelStyle):
    """Base class of both styles.   dim: the sharded dimension of the weight [N, K]."""

    dim: ClassVar[int]

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = module.base_layer if isinstance(module, AdaptedLinear) else module
        if type(layer) is not LinearNF4 and plain_class(layer) is LinearNF4:
            raise NotImplementedError(
                f"{type(self).__name__}: an adapter must not train the bias of a layer of the plan (bias='all', "
                "bias='lora_only', BitFit); leave the layer out of the plan, or the bias out of the adapter"
            )
        if type(layer) is not LinearNF4:
            raise TypeError(
                f"{type(self).__name__}: the plan must name LinearNF4 layers, got {type(layer).__name__}; for dense "
                "layers use torch's ColwiseParallel and RowwiseParallel"
            )
        if isinstance(module, AdaptedLinear):
            self._check_adapters(module)
        _cut(layer, self.dim, device_mesh)
        if isinstance(module, AdaptedLinear):
            module.in_features, module.out_features = layer.in_features, layer.out_features
            for delta in module.deltas.values():
                self._cut_lora(delta, device_mesh)
        return module

    def _check_adapters(self, module: AdaptedLinear) -> None:
        for name, delta in module.deltas.items():
            plain = type(delta) is LoraLinear and delta.fixed_A is None and delta.lora_B.bias is None
            if not plain or delta.dropout_p:
                raise NotImplementedError(
                    f"{type(self).__name__}: adapters must be LoRA without bias and dropout, and of no PiSSA or OLoRA "
                    f"start, got {name!r}, a {type(delta).__name__} with dropout {getattr(delta, 'dropout_p', 0)}"
                )
        if module.merged_layer is not None or module.fused_projections is not None:
            raise NotImplementedError(f"{type(self).__name__}: adapters must be neither merged nor fused")

    def _cut_lora(self, delta: Any, mesh: DeviceMesh) -> None:
        cut, whole = (delta.lora_B, delta.lora_A) if self.dim == 0 else (delta.lora_A, delta.lora_B)
        cut.weight = _distributed(cut.weight, mesh, True, self.dim)
        whole.weight = _distributed(whole.weight, mesh, False, self.dim)


def _distributed(parameter: nn.Parameter, mesh: DeviceMesh, cut: bool, dim: int) -> nn.Parameter:
    """Return the parameter as a DTensor, cut along `dim` or whole; all processes start from rank 0's values."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    tensor = distribute_tensor(parameter.detach(), mesh, [Shard(dim) if cut else Replicate()])
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


class ColwiseNF4(_StyleNF4):
    """Column-parallel: splits the rows of W [N, K], so that each process computes N / world features of y.

    Raises ValueError unless N is divisible by the number of processes and N / world * K by the block size.
    """

    dim = 0


class RowwiseNF4(_StyleNF4):
    """Row-parallel: splits the columns of W [N, K]; each process takes K / world features of x, and y is summed.

    Raises ValueError unless K / world is divisible by the block size.
    """

    dim = 1


def _cut(layer: LinearNF4, dim: int, mesh: DeviceMesh) -> None:
    """Keep this process's part of the weight in `layer`, bit for bit.

    Constants stay in 8 bits if the part consists of whole groups of 256 blocks; otherwise the first level is kept in
    fp32, which is exact.
    """
    world, rank = mesh.size(), mesh.get_local_rank()
    N, K, blocksize = layer.out_features, layer.in_features, layer.blocksize
    if (N, K)[dim] % world:
        name = ("out_features", "in_features")[dim]
        raise ValueError(f"tensor parallel: {name} must be divisible by {world} processes, got {(N, K)[dim]}")
    n, k = (N // world, K) if dim == 0 else (N, K // world)
    if (n * K if dim == 0 else k) % blocksize:
        raise ValueError(
            f"tensor parallel: the part of a process must be whole blocks of {blocksize} weights, got a part [{n}, "
            f"{k}] of [{N}, {K}]"
        )
    state = layer.quant_state

    def part(tensor: Tensor, per_row: int) -> Tensor:
        """Return the part of a flat tensor with `per_row` elements per row, which may be a fraction if rows are
        split.
        """
        if dim == 0:
            return tensor.reshape(-1).chunk(world)[rank].clone()
        return tensor.reshape(N, per_row).chunk(world, 1)[rank].reshape(-1).clone()

    absmax_q, absmax_scale, absmax_offset = state.absmax_q, state.absmax_scale, state.absmax_offset
    nested = absmax_q is not None and dim == 0 and (n * K // blocksize) % NESTED_BLOCKSIZE == 0
    if nested:
        assert absmax_q is not None
        assert absmax_scale is not None
        assert absmax_offset is not None
        constants = [None, part(absmax_q, 0), part(absmax_scale, 0), absmax_offset.clone()]
    else:
        constants = [part(state.absmax, K // blocksize), None, None, None]
    packed = part(layer.packed, K // 2).reshape(-1, 1)
    layer.in_features, layer.out_features = k, n
    layer.set_weight(packed, QuantState(torch.Size((n, k)), state.dtype, blocksize, *constants))
    if layer.bias is not None:
        layer.bias = _distributed(layer.bias, mesh, dim == 0, 0)
    layer.__class__ = ParallelLinearNF4
    parallel: Any = layer
    parallel.mesh, parallel.cuts_rows = mesh, dim == 0


class _SumGradient(torch.autograd.Function):
    """The identity of x, whose gradient is summed over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _summed(grad_outputs[0], ctx.mesh), None


class _Sum(torch.autograd.Function):
    """The sum of y over the processes, whose gradient is passed to each of them."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, mesh: DeviceMesh) -> Tensor:
        return _summed(y, mesh)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def _summed(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    wait: Any = funcol.wait_tensor
    return wait(funcol.all_reduce(tensor.contiguous(), "sum", mesh))  # type: ignore[no-any-return]
