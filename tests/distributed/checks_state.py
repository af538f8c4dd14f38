"""State dicts, checkpoints and files of sharded models: each process reads its own rows, and nothing changes."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

import qlora_kernels as qk
from qlora_kernels.distributed import load_shards, own_rows, save_shards
from tests.distributed.models import (
    assert_same,
    batch,
    build,
    bytes_to_read,
    check_gradients,
    gradients,
    loss_of,
    quantized,
    shard,
    train,
    trained,
    whole,
)
from tests.distributed.processes import WORLDS, Group
from tests.support.counted_reads import counted_reads


def meta_then_load(group: Group) -> None:
    """The model is built without memory, sharded, then filled by the parameters' names and by those of checkpoints."""
    source = build(double_quant=True, mixture=True)
    loss = loss_of(source, batch())
    loss.backward()
    expected = float(loss), gradients(source)
    plain = source.state_dict()
    flat = get_model_state_dict(qk.make_shardable(build(mixture=True)))
    for state in (plain, flat):
        model = shard(build(seed=5, mixture=True).to("meta"))
        model.to_empty(device="cpu")
        if state is plain:
            cut = {
                name: torch.distributed.tensor.distribute_tensor(
                    state[name], p.device_mesh, p.placements, src_data_rank=None
                )
                for name, p in model.named_parameters()
                if name in state and isinstance(p, DTensor)
            }
            model.load_state_dict({**state, **cut})
        else:
            set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
        check_gradients(group, model, expected)


def adapter_files(group: Group) -> None:
    """save_pretrained gathers only the adapter and writes once, and the files equal those of one process."""
    for method in ("lora", "adalora", "head", "bitfit"):
        reference, model = build(method), shard(build(method))
        if group.rank == 0:
            reference.save_pretrained(group.folder / f"{method} whole")
        model.save_pretrained(group.folder / f"{method} sharded")
        names = ["whole", "sharded"]
        files = [load_file(group.folder / f"{method} {name}" / "adapter_model.safetensors") for name in names]
        assert_same(files[1], files[0], rtol=0.0)
        for module in quantized(model).values():
            assert all(isinstance(p, DTensor) for p in module.flat_parameters().values())
    adapter = get_model_state_dict(shard(build()), options=StateDictOptions(ignore_frozen_params=True))
    assert adapter, "no parameters"
    assert all("lora" in name for name in adapter), list(adapter)


def distributed_checkpoint(group: Group) -> None:
    """A checkpoint of 4 processes is read by 4, 3 and 2: weights bit for bit, states still paged."""
    folder = group.folder.parent / "checkpoint"
    if group.world == max(WORLDS):
        model = shard(build())
        optimizer = qk.PagedAdamW(trained(model).values(), lr=1e-2, eps=1e-3)
        train(model, optimizer, group)
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=folder)
    reference = build()
    train(reference, one := qk.PagedAdamW(trained(reference).values(), lr=1e-2, eps=1e-3), Group(0, 1, group.folder))
    model = shard(build(seed=7))
    optimizer = qk.PagedAdamW(trained(model).values(), lr=1e-2, eps=1e-3, page_dir=group.folder)
    restore(model, optimizer, folder)
    for name, module in quantized(model).items():
        other = reference.get_submodule(name)
        other.move_to_parameters({})
        for key, parameter in module.flat_parameters().items():
            assert torch.equal(whole(parameter), other.flat_parameters()[key])
    assert optimizer.paging_report().kinds == ("mapped",)
    train(reference, one, Group(0, 1, group.folder))
    train(model, optimizer, group)
    assert_same({name: whole(p) for name, p in trained(model).items()}, trained(reference), rtol=1e-4)


def restore(model, optimizer, folder, **options) -> None:
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder, **options)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def checkpoint_of_one_process(group: Group) -> None:
    """One process without sharding reads a checkpoint of several, and several read that of one; 8-bit states too."""
    if group.world != 2:
        return
    for options in ({}, {"state_bits": 8, "page_dir": group.folder}):
        several, one = group.folder / f"several {len(options)}", group.folder / f"one {len(options)}"
        model = shard(build())
        optimizer = qk.PagedAdamW(trained(model).values(), lr=1e-2, eps=1e-3, **options)
        train(model, optimizer, group)
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=several)
        expected = {name: whole(p).detach() for name, p in model.named_parameters()}
        if group.rank == 0:
            alone = qk.make_shardable(build(seed=7))
            own = qk.PagedAdamW(trained(alone).values(), lr=1e-2, eps=1e-3, **options)
            restore(alone, own, several, no_dist=True)
            assert_same(dict(alone.named_parameters()), expected, rtol=0.0)
            train(alone, own, Group(0, 1, group.folder))
            state = {"model": get_model_state_dict(alone), "optimizer": get_optimizer_state_dict(alone, own)}
            dcp.save(state, checkpoint_id=one, no_dist=True)
        dist.barrier()
        train(model, optimizer, group)
        restored = shard(build(seed=8))
        again = qk.PagedAdamW(trained(restored).values(), lr=1e-2, eps=1e-3, **options)
        restore(restored, again, one)
        rtol = 2e-2 if options else 1e-4
        for m, o in ((model, optimizer), (restored, again)):
            train(m, o, group, steps=1)
        actual = {name: whole(p) for name, p in trained(restored).items()}
        assert_same(actual, {name: whole(p) for name, p in trained(model).items()}, rtol)


def files(group: Group) -> None:
    """Each process reads its rows of a checkpoint, and a sharded model writes the same file as one process."""
    for mixture, double_quant in ((False, True), (True, True), (True, False), (False, False)):
        source = build(double_quant=double_quant, mixture=mixture).unload()
        folder = group.folder / f"base {mixture} {double_quant}"
        if group.rank == 0:
            folder.mkdir()
            save_file({name: t.clone() for name, t in source.state_dict().items()}, folder / "model.safetensors")
        dist.barrier()
        model = build(seed=6, double_quant=double_quant, mixture=mixture)
        before = {name: p.detach().clone() for name, p in trained(model).items()}
        shard(model)
        with counted_reads(own_rows) as reads:
            read = load_shards(model, folder)
        assert read == sum(reads) == bytes_to_read(model.get_base_model(), folder / "model.safetensors")
        assert_same({name: whole(p) for name, p in trained(model).items()}, before, rtol=0.0)
        save_shards(model, group.folder / "again.safetensors")
        wanted, got = load_file(folder / "model.safetensors"), load_file(group.folder / "again.safetensors")
        assert wanted.keys() == got.keys()
        for name, tensor in wanted.items():
            assert torch.equal(tensor, got[name]), name
        dist.barrier()
    other = shard(build(double_quant=True))
    with pytest.raises(ValueError, match=r"must have the \(shape, blocksize, double_quant\) of the model"):
        load_shards(other, folder)
    with pytest.raises(RuntimeError, match=r"load_shards: blocks\.0\.up must be under make_shardable"):
        load_shards(build(), folder)


def failed_writes(group: Group) -> None:
    """A file that rank 0 cannot write is an error in every process, and none of them waits for the others."""
    file = group.folder / "a file"
    file.touch()
    words = "a file" if group.rank == 0 else "save_shards: rank 0 must be able to write the files, got NotADirectory"
    with pytest.raises((RuntimeError, OSError), match=words):
        save_shards(shard(build()), file / "model.safetensors")


def packed_in_another_dtype(group: Group) -> None:
    """Packed indices that a file has as bfloat16, as bitsandbytes' quant_storage stores them, are read as bytes."""
    folder = group.folder / "in bfloat16"
    if group.rank == 0:
        folder.mkdir()
        state = {name: t.clone() for name, t in build().unload().state_dict().items()}
        packed = {name: t for name, t in state.items() if t.dtype == torch.uint8 and t.dim() == 2}
        state |= {name: t.reshape(-1).view(torch.bfloat16).reshape(-1, 1) for name, t in packed.items()}
        save_file(state, folder / "model.safetensors")
    dist.barrier()
    model = shard(build(seed=6))
    load_shards(model, folder)
    expected = qk.make_shardable(build())
    for name, module in quantized(model).items():
        packed = expected.get_submodule(name).flat_parameters()["packed_flat"]
        assert torch.equal(whole(module.flat_parameters()["packed_flat"]), packed)


def files_of_bitsandbytes(group: Group) -> None:
    """A checkpoint that bitsandbytes wrote, in two files, is read by rows."""
    if group.world != 2 or importlib.util.find_spec("bitsandbytes") is None:
        return
    folder = group.folder / "bitsandbytes"
    if group.rank == 0:
        folder.mkdir()
        source = qk.to_bnb(build().unload())
        tensors = {name: t.clone() for name, t in source.state_dict().items()}
        weight_map = {name: f"{'ab'[name.startswith('blocks.1')]}.safetensors" for name in tensors}
        for file in ("a.safetensors", "b.safetensors"):
            save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    dist.barrier()
    model = shard(build(seed=6))
    with counted_reads(own_rows) as reads:
        read = load_shards(model, folder)
    assert read == sum(reads)
    assert read == bytes_to_read(model.get_base_model(), *(folder / f"{file}.safetensors" for file in "ab"))
    expected = qk.make_shardable(build())
    for name, module in quantized(model).items():
        for key, parameter in expected.get_submodule(name).flat_parameters().items():
            assert torch.equal(whole(module.flat_parameters()[key]), parameter), (name, key)


CHECKS = {
    f.__name__: f
    for f in (
        meta_then_load,
        adapter_files,
        distributed_checkpoint,
        checkpoint_of_one_process,
        files,
        failed_writes,
        packed_in_another_dtype,
        files_of_bitsandbytes,
    )
}
