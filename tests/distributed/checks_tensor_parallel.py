"""Tensor-parallel NF4 layers with LoRA compared with one process, also with FSDP2 over the other mesh axis."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import qlora_kernels as qk
from qlora_kernels.distributed.tensor_parallel import ColwiseNF4, RowwiseNF4
from qlora_kernels.peft import (
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model,
)
from tests.distributed.models import assert_same, trained, whole
from tests.distributed.processes import Group

WIDTH, HIDDEN = 256, 1024
UP, DOWN = "base_model.blocks.*.up", "base_model.blocks.*.down"
PLAN = {UP: ColwiseNF4(), DOWN: RowwiseNF4()}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.blocks(x)


def build(seed: int = 0, **options):
    torch.manual_seed(seed)
    model = Stack()
    qk.replace_linear(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["up", "down"], **options))
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in trained(model).values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def batch():
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(5))


def step(model, x, optimizer=None):
    loss = model(x).square().mean()
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    return loss


def same_as_one_process(group: Group) -> None:
    reference, model = build(), build(seed=0)
    parallelize_module(model, init_device_mesh("cpu", (group.world,)), PLAN)
    assert step(model, batch()).item() == pytest.approx(step(reference, batch()).item(), rel=1e-6)
    grads = {name: p.grad for name, p in trained(reference).items()}
    assert_same({name: whole(p.grad) for name, p in trained(model).items()}, grads, rtol=1e-5)
    for layer, dim in (("up", 0), ("down", 1)):
        base = [m.base_model.blocks[0].get_submodule(layer).base_layer for m in (model, reference)]
        assert torch.equal(base[0].dequantize(), base[1].dequantize().chunk(group.world, dim)[group.rank])
        local = trained(model)[f"base_model.blocks.0.{layer}.deltas.default.lora_{'BA'[dim]}.weight"]
        assert local.to_local().numel() == local.numel() // group.world
    assert model.base_model.blocks[0].up.base_layer.double_quant  # 1024 blocks over 2 or 4: whole groups
    for m in (reference, model):
        optimizer = qk.PagedAdamW(trained(m).values(), lr=1e-2, eps=1e-3, max_grad_norm=0.1)
        optimizer.step()
    assert_same({name: whole(p) for name, p in trained(model).items()}, trained(reference), rtol=1e-4)
    model.save_pretrained(group.folder / "parallel")
    if group.rank == 0:
        reference.save_pretrained(group.folder / "one")
        files = [load_file(group.folder / name / "adapter_model.safetensors") for name in ("parallel", "one")]
        assert_same(*files, rtol=1e-4)


def with_fsdp(group: Group) -> None:
    """Pairs of processes share the parts of each layer, and the pairs share the batch."""
    if group.world != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    reference, model = build(), build()
    parallelize_module(model, mesh["tp"], PLAN)
    qk.make_shardable(model)
    for block in model.base_model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    loss = step(model, batch().chunk(2)[mesh["dp"].get_local_rank()]).detach()
    dist.all_reduce(loss)
    assert float(loss) / 4 == pytest.approx(step(reference, batch()).item(), rel=1e-6)
    grads = {name: p.grad for name, p in trained(reference).items()}
    assert_same({name: whole(p.grad) for name, p in trained(model).items()}, grads, rtol=1e-5)
    qk.PagedAdamW(trained(reference).values(), lr=1e-2, eps=1e-3, max_grad_norm=0.1).step()
    qk.PagedAdamW(trained(model).values(), lr=1e-2, eps=1e-3, max_grad_norm=0.1).step()
    assert_same({name: whole(p) for name, p in trained(model).items()}, trained(reference), rtol=1e-4)


class Tokens(nn.Module):
    """A stack between an embedding and the head that is tied to it, with a parameter that is used by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, 16, bias=False)
        self.head.weight = self.embed.weight
        self.mix = nn.Module()
        self.mix.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, ids):
        return self.head(self.blocks(nn.functional.linear(self.embed(ids), self.mix.weight)))


def _tokens_model():
    torch.manual_seed(0)
    model = Tokens()
    qk.replace_linear(model, skip=("head",))
    config = LoraConfig(
        r=4,
        target_modules=["up", "down"],
        trainable_token_indices={"embed": [1, 3]},
        target_parameters=["mix.weight"],
        modules_to_save=["norm"],
    )
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(model).values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def other_parts_of_an_adapter(group: Group) -> None:
    """Token rows of a tied embedding, LoRA of a parameter and trained norms are whole beside the plan, and train."""
    ids = torch.arange(16).reshape(4, 4)
    reference, meshes = _tokens_model(), [init_device_mesh("cpu", (1, group.world), mesh_dim_names=("dp", "tp"))]
    if group.world == 4:
        meshes.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")))
    optimizer = qk.PagedAdamW(trained(reference).values(), lr=1e-2, eps=1e-3, max_grad_norm=0.1)
    for _ in range(3):
        step(reference, ids, optimizer)
        optimizer.zero_grad()
    for mesh in meshes:
        model, shares = _tokens_model(), mesh["dp"].size()
        parallelize_module(model, mesh["tp"], PLAN)
        if shares > 1:
            qk.make_shardable(model)
            for block in model.base_model.blocks:
                fully_shard(block, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
        optimizer = qk.PagedAdamW(trained(model).values(), lr=1e-2, eps=1e-3, max_grad_norm=0.1)
        for _ in range(3):
            step(model, ids.chunk(shares)[mesh["dp"].get_local_rank()], optimizer)
            optimizer.zero_grad()
        assert_same({name: whole(p) for name, p in trained(model).items()}, trained(reference), rtol=1e-4)
        folder = group.folder / f"tokens {shares}"
        model.save_pretrained(folder)
        if group.rank == 0:
            reference.save_pretrained(group.folder / "tokens one")
            files = [load_file(f / "adapter_model.safetensors") for f in (folder, group.folder / "tokens one")]
            assert_same(*files, rtol=1e-4)


def trained_biases(group: Group) -> None:
    """The layers' own biases train: those of split rows in parts, those of split columns once."""

    def make():
        torch.manual_seed(0)
        model = Stack()
        qk.replace_linear(model)
        return model

    reference, model = make(), make()
    plan = {name.removeprefix("base_model."): style for name, style in PLAN.items()}
    parallelize_module(model, init_device_mesh("cpu", (group.world,)), plan)
    for m in (reference, model):
        optimizer = qk.PagedAdamW(trained(m).values(), lr=1e-2, eps=1e-3, max_grad_norm=0.1)
        for _ in range(3):
            step(m, batch(), optimizer)
            optimizer.zero_grad()
    assert_same({name: whole(p) for name, p in trained(model).items()}, trained(reference), rtol=1e-4)
    assert any(name.endswith("down.bias") for name in trained(model))


def checkpointed_and_compiled(group: Group) -> None:
    reference = build()
    step(reference, batch())
    expected = {name: p.grad for name, p in trained(reference).items()}
    for change in ("checkpoint", "compile"):
        model = build()
        parallelize_module(model, init_device_mesh("cpu", (group.world,)), PLAN)
        blocks = model.base_model.blocks
        if change == "compile":
            for block in blocks:
                block.compile(backend="aot_eager")
        x = batch().requires_grad_()
        if change == "checkpoint":
            for block in blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            x.square().mean().backward()
        else:
            step(model, x)
        assert_same({name: whole(p.grad) for name, p in trained(model).items()}, expected, rtol=1e-5)


def refusals(group: Group) -> None:
    mesh = init_device_mesh("cpu", (group.world,))
    up = {"base_model.blocks.0.up": ColwiseNF4()}
    with pytest.raises(NotImplementedError, match="adapters must be LoRA without bias and dropout"):
        parallelize_module(build(use_dora=True), mesh, up)
    for which in ("all", "lora_only"):
        with pytest.raises(NotImplementedError, match="an adapter must not train the bias of a layer of the plan"):
            parallelize_module(build(bias=which), mesh, up)
    with pytest.raises(NotImplementedError, match=r"dropout 0\.5"):
        parallelize_module(build(lora_dropout=0.5), mesh, up)
    for config in (
        IA3Config(target_modules=["up"], feedforward_modules=[]),
        VeraConfig(target_modules=["up"], r=4),
        LoHaConfig(target_modules=["up"], r=2),
        LoKrConfig(target_modules=["up"], r=2),
        OFTConfig(target_modules=["up"], oft_block_size=8),
        BOFTConfig(target_modules=["up"], boft_block_size=8),
    ):
        model = Stack()
        qk.replace_linear(model)
        with pytest.raises(NotImplementedError, match=r"adapters must be LoRA .*got 'default', a \w+Linear"):
            parallelize_module(get_peft_model(model, config), mesh, up)
    with pytest.raises(TypeError, match="the plan must name LinearNF4 layers, got LayerNorm"):
        parallelize_module(build(), mesh, {"base_model.blocks.0.norm": ColwiseNF4()})
    for style, shape, words in (
        (ColwiseNF4(), (64, 6), "out_features must be divisible by"),
        (RowwiseNF4(), (96, 64), "must be whole blocks of 64 weights"),
    ):
        if shape[1] % group.world or shape == (96, 64):
            with pytest.raises(ValueError, match=words):
                parallelize_module(qk.LinearNF4(*shape), mesh, style)


CHECKS = {
    f.__name__: f
    for f in (
        same_as_one_process,
        with_fsdp,
        other_parts_of_an_adapter,
        trained_biases,
        checkpointed_and_compiled,
        refusals,
    )
}
