"""Options of torch's FSDP2, DistributedDataParallel and checkpoints that training scripts use, over NF4 weights."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import qlora_kernels as qk
from tests.distributed.models import (
    METHODS,
    assert_same,
    batch,
    build,
    check_gradients,
    expected_gradients,
    gradients,
    loss_of,
    shard,
    train,
    trained,
    whole,
)
from tests.distributed.processes import Group

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def accumulated_gradients(group: Group) -> None:
    """Micro batches whose gradients are reduced once sum to the gradient of one process, under FSDP2 and DDP."""
    reference = build()
    for seed in (2, 3):
        loss_of(reference, batch(seed)).backward()
    sharded = shard(build())
    copied = DistributedDataParallel(build())
    for model in (sharded, copied):
        for last, seed in ((False, 2), (True, 3)):
            part = batch(seed).chunk(group.world)[group.rank]
            if model is sharded:
                model.set_requires_gradient_sync(last)
                loss_of(model, part).backward()
            elif last:
                loss_of(model, part).backward()
            else:
                with model.no_sync():
                    loss_of(model, part).backward()
    assert_same(gradients(sharded), gradients(reference), rtol=1e-5)
    assert_same(gradients(copied.module), gradients(reference), rtol=1e-5)


def clipped_by_torch(group: Group) -> None:
    """clip_grad_norm_ and torch's AdamW act on sharded parameters as on whole ones."""
    reference, model = build("head"), shard(build("head"))
    loss_of(reference, batch()).backward()
    loss_of(model, batch().chunk(group.world)[group.rank]).backward()
    norms = [torch.nn.utils.clip_grad_norm_(trained(m).values(), 0.1) for m in (reference, model)]
    assert float(whole(norms[1])) == pytest.approx(float(norms[0]), rel=1e-5)
    for m in (reference, model):
        torch.optim.AdamW(trained(m).values(), lr=1e-2, eps=1e-3).step()
    assert_same({name: whole(p) for name, p in trained(model).items()}, trained(reference), rtol=1e-4)


def full_state_dicts(group: Group) -> None:
    """Whole state dicts of model and optimizer, held by rank 0 alone, are broadcast into shards of another model."""
    model = shard(build())
    optimizer = qk.PagedAdamW(trained(model).values(), lr=1e-2, eps=1e-3)
    train(model, optimizer, group)
    weights = get_model_state_dict(model, options=FULL)
    states = get_optimizer_state_dict(model, optimizer, options=FULL)
    if group.rank:
        assert not weights, list(weights)
    again = shard(build(seed=5).to("meta"))
    again.to_empty(device="cpu")
    resumed = qk.PagedAdamW(trained(again).values(), lr=1e-2, eps=1e-3)
    set_model_state_dict(again, weights, options=FROM_RANK_0)
    set_optimizer_state_dict(again, resumed, states, options=FROM_RANK_0)
    for name, parameter in model.named_parameters():
        assert torch.equal(whole(parameter), whole(dict(again.named_parameters())[name])), name
    for m, o in ((model, optimizer), (again, resumed)):
        train(m, o, group, steps=2)
    assert_same(
        {n: whole(p) for n, p in trained(again).items()}, {n: whole(p) for n, p in trained(model).items()}, 1e-6
    )


def saved_asynchronously(group: Group) -> None:
    """A checkpoint that is written in the background holds the values of the time of the call."""
    model = shard(build())
    optimizer = qk.PagedAdamW(trained(model).values(), lr=1e-2, eps=1e-3)
    train(model, optimizer, group)
    expected = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    own_group = dist.new_group(backend="gloo")  # the background thread must not use the group of training
    written = dcp.async_save(state, checkpoint_id=group.folder / "async", process_group=own_group)
    train(model, optimizer, group)
    written.result()
    restored = shard(build(seed=5))
    other = qk.PagedAdamW(trained(restored).values(), lr=1e-2, eps=1e-3)
    state = {"model": get_model_state_dict(restored), "optimizer": get_optimizer_state_dict(restored, other)}
    dcp.load(state, checkpoint_id=group.folder / "async")
    set_model_state_dict(restored, state["model"])
    set_optimizer_state_dict(restored, other, state["optimizer"])
    assert_same({name: whole(p) for name, p in restored.named_parameters()}, expected, rtol=0.0)
    for m, o in ((model, optimizer), (restored, other)):
        train(m, o, group, steps=1)


def trained_over_two_dimensions(group: Group) -> None:
    """Replicas of shards train and save as one process does, and an FSDP2 model reads the checkpoint."""
    if group.world != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    reference, model = build(), shard(build(), mesh)
    optimizer = qk.PagedAdamW(trained(model).values(), lr=1e-2, eps=1e-3, max_grad_norm=0.1, page_dir=group.folder)
    train(model, optimizer, group)
    one = qk.PagedAdamW(trained(reference).values(), lr=1e-2, eps=1e-3, max_grad_norm=0.1)
    train(reference, one, Group(0, 1, group.folder))
    assert_same({name: whole(p) for name, p in trained(model).items()}, trained(reference), rtol=1e-4)
    model.save_pretrained(group.folder / "hybrid adapter")
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=group.folder / "hybrid")
    flat = shard(build(seed=5))
    other = qk.PagedAdamW(trained(flat).values(), lr=1e-2, eps=1e-3, max_grad_norm=0.1)
    state = {"model": get_model_state_dict(flat), "optimizer": get_optimizer_state_dict(flat, other)}
    dcp.load(state, checkpoint_id=group.folder / "hybrid")
    set_model_state_dict(flat, state["model"])
    set_optimizer_state_dict(flat, other, state["optimizer"])
    train(flat, other, group)
    train(reference, one, Group(0, 1, group.folder))
    assert_same({name: whole(p) for name, p in trained(flat).items()}, trained(reference), rtol=1e-4)


def offloaded_to_the_cpu(group: Group) -> None:
    policy = CPUOffloadPolicy(pin_memory=False)
    check_gradients(group, shard(build(), offload_policy=policy), expected_gradients())


def placed_by_columns(group: Group) -> None:
    """lora_A sharded by columns, where its rows are fewer than the processes."""
    if group.world == 3:
        return

    def place(parameter):
        return Shard(1) if parameter.dim() == 2 and parameter.shape[1] == 80 and parameter.shape[0] == 3 else None

    model = shard(build(), shard_placement_fn=place)
    check_gradients(group, model, expected_gradients())
    optimizer = qk.PagedAdamW(trained(model).values(), lr=1e-2, eps=1e-3)
    train(model, optimizer, group)
    reference = build()
    loss_of(reference, batch()).backward()
    train(reference, qk.PagedAdamW(trained(reference).values(), lr=1e-2, eps=1e-3), Group(0, 1, group.folder))
    assert any(p.placements == (Shard(1),) for p in trained(model).values())


def adapters_switched(group: Group) -> None:
    """A model without its adapter, as DPO's reference, and with another one, added before sharding."""
    reference, model = build(), build()
    for m in (reference, model):
        torch.manual_seed(9)
        m.add_adapter("second", METHODS["rslora"])
    shard(model)
    x = batch()
    with torch.no_grad():
        for name in (None, "second", "default"):
            outputs = []
            for m in (reference, model):
                if name is not None:
                    m.set_adapter(name)
                with m.disable_adapter() if name is None else nullcontext():
                    outputs.append(m(x))
            assert torch.allclose(*outputs, rtol=1e-5, atol=1e-6)
    check_gradients(group, model, expected_gradients())


CHECKS = {
    f.__name__: f
    for f in (
        accumulated_gradients,
        clipped_by_torch,
        full_state_dicts,
        saved_asynchronously,
        trained_over_two_dimensions,
        offloaded_to_the_cpu,
        placed_by_columns,
        adapters_switched,
    )
}
