"""Small models with NF4 and adapters, of sizes that no number of processes divides, and their sharding."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import qlora_kernels as qk
from qlora_kernels.nn.plain_projection import plain_projections
from qlora_kernels.nn.quantized_weight import QuantizedWeight
from qlora_kernels.ops.attention import Keys
from qlora_kernels.ops.gated_mlp import GatedMLP, gated_mlp
from qlora_kernels.ops.lora_attention import LoRAAttention, lora_attention
from qlora_kernels.peft import AdaLoraConfig, BitFitConfig, LoraConfig, PeftConfig, get_peft_model

WIDTH, HIDDEN, CLASSES = 80, 203, 5
TARGETS = ["up", "down"]


class Block(nn.Module):
    """A residual MLP of 80 and 203 features, in which blocks of 64 weights straddle rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class MixtureBlock(nn.Module):
    """Three experts, each used by the rows whose index it divides."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.Module()
        self.experts.weight = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(dim=-1)
        parts = [nn.functional.linear(x, self.experts.weight[e]) * shares[:, e, None] for e in range(3)]
        return x + sum(parts)


class OneNodeBlock(nn.Module):
    """Attention over the rows as one sequence, and a gated MLP, each of which runs as one autograd node."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        attention = plain_projections(x, self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        mlp = plain_projections(x, self.gate_proj, self.up_proj, self.down_proj)
        assert attention is not None
        assert mlp is not None
        T, D = len(x), WIDTH // 2
        angles = torch.arange(T)[:, None] * torch.ones(D) / 7
        keys = Keys(torch.zeros(1, T, dtype=torch.int64), torch.full((1, T), T), D**-0.5, 0.0)
        q, k, v, o = attention
        x = x + lora_attention(x[None], LoRAAttention(q, k, v, o, D, angles.cos()[None], angles.sin()[None], keys))[0]
        gate, up, down = mlp
        y = gated_mlp(x, GatedMLP(gate, up, down, "silu"))
        if torch.is_grad_enabled():
            assert y.grad_fn is not None
            assert "GatedMLPFunction" in y.grad_fn.name()
        return x + y


class Net(nn.Module):
    def __init__(self, *, mixture: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), *([MixtureBlock()] if mixture else [])])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


METHODS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS),
    "dora": LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, use_dora=True),
    "rslora": LoraConfig(r=2, target_modules=TARGETS, use_rslora=True),
    "adalora": AdaLoraConfig(target_modules=TARGETS, init_r=4, target_r=2, tinit=0, tfinal=1, total_step=3),
    "bitfit": BitFitConfig(),
    "head": LoraConfig(r=3, target_modules=TARGETS, modules_to_save=["head"]),
}


def build(method: str = "lora", *, seed: int = 0, double_quant: bool = True, mixture: bool = False) -> Any:
    """Return the model in NF4 with an adapter of random parameters, equal in every process."""
    torch.manual_seed(seed)
    model = Net(mixture=mixture)
    qk.replace_linear(model, skip=("head", *(["router"] if mixture else [])), double_quant=double_quant)
    if mixture:
        qk.replace_experts(model, double_quant=double_quant)
    model = get_peft_model(model, METHODS[method])
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def build_one_node_blocks() -> Any:
    """Return two OneNodeBlocks in NF4 with a random adapter, equal in every process."""
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([OneNodeBlock(), OneNodeBlock()])
    model.forward = lambda x: model.blocks[1](model.blocks[0](x))
    qk.replace_linear(model)
    return get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))


def shard(model: Any, mesh: Any = None, **options: Any) -> Any:
    """Apply make_shardable, then fully_shard to the blocks and the model."""
    qk.make_shardable(model)
    mesh = mesh or init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    apply = partial(fully_shard, mesh=mesh, **options)
    for block in model.base_model.blocks:
        apply(block)
    return apply(model)


def batch(seed: int = 2) -> Tensor:
    """Return 12 rows, which 2, 3 and 4 processes can share."""
    return torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Return a mean over the rows, so that the mean over equal parts equals that over the whole."""
    return model(x).square().mean()


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, or any other tensor itself. Every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-6) -> None:
    """Assert equal names, and each tensor equal within rtol of its largest element."""
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    for name, wanted in expected.items():
        bound = rtol * max(float(wanted.float().abs().max()), 1e-8)
        worst = float((actual[name].detach().float() - wanted.detach().float()).abs().max()) if wanted.numel() else 0.0
        assert worst <= bound, f"{name}: {worst} > {bound}"


def quantized(model: nn.Module) -> dict[str, QuantizedWeight]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedWeight)}


def expected_gradients(method: str = "lora", **options: Any) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients of one process with the whole batch."""
    reference = build(method, **options)
    loss = loss_of(reference, batch())
    loss.backward()
    return float(loss), gradients(reference)


def check_gradients(
    group: Any, model: nn.Module, expected: tuple[float, dict[str, Tensor]], rtol: float = 1e-6
) -> None:
    """Assert that the loss and the gradients of parts of the batch in all processes are the expected ones."""
    loss = loss_of(model, batch().chunk(group.world)[group.rank])
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    assert abs(float(total) / group.world - expected[0]) <= rtol * abs(expected[0])
    assert_same(gradients(model), expected[1], rtol)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model: Any, optimizer: torch.optim.Optimizer, group: Any, steps: int = 3) -> None:
    """Run a few steps on this process's part of the batch."""
    for step in range(steps):
        x = batch(seed=10 + step).chunk(group.world)[group.rank]
        (loss_of(model, x) + model.peft_loss()).backward()
        model.step(step)
        optimizer.step()
        optimizer.zero_grad()


def bytes_to_read(model: nn.Module, *files: Path) -> int:
    """Return the bytes of this process's parts of the base, and those of tables and JSON entries, which all read."""
    parts, seen = 0, set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            offset = name == "absmax_offset_flat" and isinstance(module, qk.LinearNF4)  # it is in the JSON entry
            if not (parameter.requires_grad or offset or id(parameter) in seen):
                seen.add(id(parameter))
                parts += parameter.to_local().nbytes
        for name, buffer in module.named_buffers(recurse=False):
            parts += buffer.nbytes * (name not in module._non_persistent_buffers_set)
    tables = ("quant_state.bitsandbytes__nf4", "quant_map")
    entries = (t.nbytes for file in files for name, t in load_file(file).items() if name.endswith(tables))
    return parts + sum(entries)
