"""FSDP2 over NF4 weights compared with one process: what each process holds, sends, computes and saves."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import qlora_kernels as qk
from qlora_kernels.distributed import load_shards, save_shards
from qlora_kernels.distributed.byte_plan import Rows, dense_rows, gathered_bytes, held_bytes, lora_rows, nf4_rows
from qlora_kernels.nn.quantized_weight import QuantizedWeight
from tests.distributed.models import (
    CLASSES,
    HIDDEN,
    METHODS,
    WIDTH,
    Net,
    assert_same,
    batch,
    build,
    gradients,
    loss_of,
    shard,
    train,
    trained,
    whole,
)
from tests.distributed.processes import Group


def expected_gradients(method="lora", **options):
    reference = build(method, **options)
    loss = loss_of(reference, batch())
    loss.backward()
    return float(loss), gradients(reference)


def check_gradients(group: Group, model, expected, rtol: float = 1e-6) -> None:
    loss = loss_of(model, batch().chunk(group.world)[group.rank])
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    assert abs(float(total) / group.world - expected[0]) <= rtol * abs(expected[0])
    assert_same(gradients(model), expected[1], rtol)


def quantized(model) -> dict[str, QuantizedWeight]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedWeight)}


def methods(group: Group) -> None:
    for method in METHODS:
        check_gradients(group, shard(build(method)), expected_gradients(method))


def bytes_held_and_gathered(group: Group) -> None:
    """The bytes that are held, gathered and reduced equal those of the formulas."""
    for double_quant in (True, False):
        weights = [
            rows
            for N, K in 2 * [(HIDDEN, WIDTH), (WIDTH, HIDDEN)]
            for rows in nf4_rows(N, K, double_quant=double_quant)
        ]
        r = METHODS["lora"].r
        adapters = [rows for N, K in 2 * [(HIDDEN, WIDTH), (WIDTH, HIDDEN)] for rows in lora_rows(N, K, r)]
        dense = 2 * [Rows(WIDTH, 4), Rows(WIDTH, 4), Rows(WIDTH, 4)]  # LayerNorm's weight and bias, the bias of `down`
        head = [*dense_rows(CLASSES, WIDTH, itemsize=4), Rows(CLASSES, 4)]
        model = shard(build(double_quant=double_quant))
        parts = [p.to_local() for module in quantized(model).values() for p in module.flat_parameters().values()]
        assert sum(part.nbytes for part in parts) == held_bytes(weights, group.world, group.rank)
        sizes: list[int] = []
        reduced: list[int] = []
        with counting("all_gather", "output_tensor", sizes), counting("reduce_scatter", "input", reduced):
            loss = loss_of(model, batch())
            forward = sum(sizes)
            loss.backward()
        blocks = gathered_bytes([*weights, *adapters, *dense], group.world)
        assert forward == blocks + gathered_bytes(head, group.world), (forward, blocks)
        assert sum(sizes) - forward == blocks  # the root stays gathered
        assert len(sizes) == 5
        assert sum(reduced) == gathered_bytes(adapters, group.world)
        assert len(reduced) == 2


def one_block_whole_at_a_time(group: Group) -> None:
    """While a layer runs, forward or backward, the NF4 bytes of its own block are whole, and of no other block."""
    model = shard(build())
    seen: list[int] = []

    def note(*_):
        flat = [p for module in quantized(model).values() for p in module.flat_parameters().values()]
        seen.append(sum(p.nbytes for p in flat if not isinstance(p, DTensor)))

    for module in quantized(model).values():
        module.register_forward_pre_hook(note)
        adapted = model.get_submodule(next(n for n, m in model.named_modules() if m is module).rpartition(".")[0])
        adapted.register_forward_pre_hook(note)
        adapted.register_full_backward_pre_hook(note)
    loss_of(model, batch()).backward()
    block = sum(rows.total for N, K in ((HIDDEN, WIDTH), (WIDTH, HIDDEN)) for rows in nf4_rows(N, K))
    assert len(seen) >= 8, seen
    assert set(seen) == {block}, (seen, block)
    note()
    assert seen[-1] == 0


def constants_in_fp32_and_experts(group: Group) -> None:
    for options in ({"double_quant": False}, {"mixture": True}, {"mixture": True, "double_quant": False}):
        check_gradients(group, shard(build(**options)), expected_gradients(**options))


def reshard_after_forward(group: Group) -> None:
    expected = expected_gradients()
    for value in (True, False, 2):
        if value == 2 and group.world != 4:
            continue
        model = shard(build(), reshard_after_forward=value)
        check_gradients(group, model, expected)
        for module in quantized(model).values():
            assert all(isinstance(p, DTensor) for p in module.flat_parameters().values())


def hybrid_sharding(group: Group) -> None:
    if group.world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        check_gradients(group, shard(build(), mesh), expected_gradients())


def activation_checkpointing(group: Group) -> None:
    model = build()
    qk.make_shardable(model)
    blocks = model.base_model.blocks
    for i, block in enumerate(blocks):
        blocks[i] = fully_shard(checkpoint_wrapper(block))
    wrapper = "_checkpoint_wrapped_module."
    loss, expected = expected_gradients()
    named = {
        name.replace("blocks.0.", f"blocks.0.{wrapper}").replace("blocks.1.", f"blocks.1.{wrapper}"): grad
        for name, grad in expected.items()
    }
    check_gradients(group, fully_shard(model), (loss, named))


def compiled_blocks(group: Group) -> None:
    """There are as many graphs as blocks without sharding, and no graph breaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = qk.make_shardable(build())
    for block in model.base_model.blocks:
        block.compile(backend="aot_eager")
    check_gradients(group, shard(model), expected_gradients())
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2, counters["stats"]
    assert not counters["graph_break"], counters["graph_break"]


def mixed_precision(group: Group) -> None:
    """Casts by a policy or of the model do not change the weight; results equal those of a model cast by hand."""
    for dtype in (torch.bfloat16, torch.float16):
        x = batch().chunk(group.world)[group.rank].to(dtype)
        reference = build().to(dtype)
        reference(x).float().square().mean().backward()
        expected = {name: grad.float() for name, grad in gradients(reference).items()}
        for grad in expected.values():
            dist.all_reduce(grad)
            grad /= group.world
        model = shard(build(), mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
        model(x).float().square().mean().backward()
        assert_same(gradients(model), expected, rtol=1e-5)
    plain, model = build(), shard(build())
    model.to(torch.bfloat16)
    for name, module in quantized(model).items():
        for key, parameter in module.flat_parameters().items():
            other = plain.get_submodule(name)
            other.move_to_parameters({})
            assert torch.equal(whole(parameter), other.flat_parameters()[key])


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


def order_of_operations(group: Group) -> None:
    def quantize():
        model = Net()
        qk.replace_linear(model, skip=("head",))
        return model

    for too_early, word in (
        (lambda model: fully_shard(model.blocks[0]), "sharded by fully_shard"),
        (lambda model: model.blocks[0].compile(backend="eager"), "compiled"),
        (nn.parallel.DistributedDataParallel, "wrapped by DistributedDataParallel"),
    ):
        model = quantize()
        wrapped = too_early(model)
        with pytest.raises(RuntimeError, match=f"make_shardable: .* must not be {word} yet"):
            qk.make_shardable(wrapped if isinstance(wrapped, nn.parallel.DistributedDataParallel) else model)
    with pytest.warns(UserWarning, match="FSDP leaves the NF4 weight whole in every process"):
        fully_shard(quantize())
    model = shard(build())
    assert qk.make_shardable(model) is model
    layer = model.base_model.blocks[0].up.base_layer
    for use in (lambda: layer.weight, lambda: layer(batch()), lambda: model.merge_adapter()):
        with pytest.raises(RuntimeError, match="packed must be whole to be used, got a shard"):
            use()
    model.base_model.blocks[0].unshard()
    assert torch.equal(layer.dequantize(), build().base_model.blocks[0].up.base_layer.dequantize())
    with pytest.warns(UserWarning, match="fully_shard does not synchronize parameters that are added after it"):
        model.add_adapter("second", METHODS["lora"])


def training(group: Group) -> None:
    """Clipped optimizer steps equal those of one process, with 32- and 8-bit states, in memory and paged to a disk."""
    for method, options in (
        ("lora", {}),
        ("lora", {"max_grad_norm": 0.1}),
        ("head", {"page_dir": group.folder}),
        ("adalora", {"max_grad_norm": 0.1}),
        ("lora", {"state_bits": 8}),
    ):
        reference, model = build(method), shard(build(method))
        train(
            reference,
            qk.PagedAdamW(trained(reference).values(), lr=1e-2, eps=1e-3, **options),
            Group(0, 1, group.folder),
        )
        optimizer = qk.PagedAdamW(trained(model).values(), lr=1e-2, eps=1e-3, **options)
        train(model, optimizer, group)
        actual = {name: whole(p) for name, p in trained(model).items()}
        assert_same(actual, trained(reference), rtol=1e-4 if options.get("state_bits") != 8 else 2e-2)
        numbers = sum(p.to_local().numel() for p in trained(model).values())
        assert optimizer.paging_report().parameters == numbers
        assert set(optimizer.paging_report().kinds) == ({"mapped"} if "page_dir" in options else {"resident"})


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


class counting:
    """Records the number of bytes of each all-gather or reduce-scatter of FSDP2, for the whole tensors."""

    def __init__(self, collective: str, argument: str, sizes: list[int]) -> None:
        # In newer versions of torch, names that end in "single" have replaced the older ones.
        older = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}[collective]
        names = [name for name in (f"{collective}_single", older) if hasattr(dist, name)]
        self.originals = {name: getattr(dist, name) for name in names}
        self.argument, self.sizes = argument, sizes

    def __enter__(self):
        for name, function in self.originals.items():
            setattr(dist, name, partial(self._count, function))

    def __exit__(self, *_):
        for name, function in self.originals.items():
            setattr(dist, name, function)

    def _count(self, function, *arguments, **options):
        tensor = arguments[0] if arguments else options[self.argument]
        self.sizes.append(tensor.nbytes)
        return function(*arguments, **options)


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
    for double_quant in (True, False):
        source = build(double_quant=double_quant).unload()
        folder = group.folder / f"base {double_quant}"
        if group.rank == 0:
            folder.mkdir()
            save_file({name: t.clone() for name, t in source.state_dict().items()}, folder / "model.safetensors")
        dist.barrier()
        model = build(seed=6, double_quant=double_quant)
        before = {name: p.detach().clone() for name, p in trained(model).items()}
        shard(model)
        read = load_shards(model.get_base_model(), folder)
        assert read == bytes_to_read(model.get_base_model(), folder / "model.safetensors")
        assert_same({name: whole(p) for name, p in trained(model).items()}, before, rtol=0.0)
        save_shards(model.get_base_model(), group.folder / "again.safetensors")
        wanted, got = load_file(folder / "model.safetensors"), load_file(group.folder / "again.safetensors")
        assert wanted.keys() == got.keys()
        for name, tensor in wanted.items():
            assert torch.equal(tensor, got[name]), name
        dist.barrier()
    other = shard(build(double_quant=True))
    with pytest.raises(ValueError, match=r"must have the \(shape, blocksize, double_quant\) of the model"):
        load_shards(other.get_base_model(), folder)


def bytes_to_read(model, *files) -> int:
    """Return the bytes of this process's parts of the base, and those of the JSON entries, which each process reads."""
    parts = (
        p.to_local().nbytes
        for name, p in model.named_parameters()
        if not p.requires_grad and not name.endswith("absmax_offset_flat")  # the offset is in the JSON entry
    )
    entries = (t.nbytes for file in files for name, t in load_file(file).items() if "quant_state" in name)
    return sum(parts) + sum(entries)


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
    read = load_shards(model.get_base_model(), folder)
    assert read == bytes_to_read(model.get_base_model(), *(folder / f"{file}.safetensors" for file in "ab"))
    expected = qk.make_shardable(build())
    for name, module in quantized(model).items():
        for key, parameter in expected.get_submodule(name).flat_parameters().items():
            assert torch.equal(whole(module.flat_parameters()[key]), parameter), (name, key)


def accelerate_prepares(group: Group) -> None:
    """accelerate's FSDP2 preparation, whose launcher requires a GPU, also with only rank 0's weights."""
    try:
        from accelerate.utils import fsdp_utils
    except ImportError:
        return
    expected = expected_gradients()
    policy = lambda plugin, model: lambda module: type(module).__name__ == "Block"  # noqa: E731
    original, fsdp_utils.fsdp2_prepare_auto_wrap_policy = fsdp_utils.fsdp2_prepare_auto_wrap_policy, policy
    try:
        for from_rank_0 in (False, True):
            plugin = SimpleNamespace(
                reshard_after_forward=True,
                cpu_offload=None,
                mixed_precision_policy=None,
                ignored_modules=None,
                cpu_ram_efficient_loading=from_rank_0,
                set_auto_wrap_policy=lambda model: None,
                auto_wrap_policy="blocks",
            )
            accelerator = SimpleNamespace(
                state=SimpleNamespace(fsdp_plugin=plugin),
                mixed_precision="no",
                is_main_process=group.rank == 0,
                device=torch.device("cpu"),
                parallelism_config=None,
                torch_device_mesh=None,
            )
            seed = group.rank if from_rank_0 else 0
            model = fsdp_utils.fsdp2_prepare_model(accelerator, qk.make_shardable(build(seed=seed)))
            check_gradients(group, model, expected)
            for module in quantized(model).values():
                assert all(isinstance(p, DTensor) for p in module.flat_parameters().values())
            assert get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) or group.rank
    finally:
        fsdp_utils.fsdp2_prepare_auto_wrap_policy = original


WORLDS = [4, 2, 3]

CHECKS = {
    f.__name__: f
    for f in (
        methods,
        bytes_held_and_gathered,
        one_block_whole_at_a_time,
        constants_in_fp32_and_experts,
        reshard_after_forward,
        hybrid_sharding,
        activation_checkpointing,
        compiled_blocks,
        mixed_precision,
        meta_then_load,
        order_of_operations,
        training,
        adapter_files,
        distributed_checkpoint,
        checkpoint_of_one_process,
        files,
        files_of_bitsandbytes,
        accelerate_prepares,
    )
}
