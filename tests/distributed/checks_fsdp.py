"""FSDP2 over NF4 weights compared with one process: what each process holds, sends and computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import qlora_kernels as qk
from qlora_kernels.distributed.byte_plan import Rows, dense_rows, gathered_bytes, held_bytes, lora_rows, nf4_rows
from tests.distributed.collectives import counting
from tests.distributed.models import (
    CLASSES,
    HIDDEN,
    METHODS,
    WIDTH,
    Net,
    assert_same,
    batch,
    build,
    build_one_node_blocks,
    check_gradients,
    expected_gradients,
    gradients,
    loss_of,
    quantized,
    shard,
    train,
    trained,
    whole,
)
from tests.distributed.processes import Group


def methods(group: Group) -> None:
    for method in METHODS:
        check_gradients(group, shard(build(method)), expected_gradients(method))


def one_node_attention_and_mlp(group: Group) -> None:
    """Nodes that hold the operands of several layers compute with the gathered weights, also in backward."""
    reference = build_one_node_blocks()
    rows = batch().chunk(group.world)
    losses = [loss_of(reference, part) for part in rows]  # attention is over the rows of one process
    total = sum(losses[1:], losses[0]) / group.world
    total.backward()
    # The mean over processes scales losses before their backward here and gradients after it there: fp32 roundings.
    check_gradients(group, shard(build_one_node_blocks()), (total.item(), gradients(reference)), rtol=1e-5)


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


CHECKS = {
    f.__name__: f
    for f in (
        methods,
        one_node_attention_and_mlp,
        bytes_held_and_gathered,
        one_block_whole_at_a_time,
        constants_in_fp32_and_experts,
        reshard_after_forward,
        hybrid_sharding,
        activation_checkpointing,
        compiled_blocks,
        mixed_precision,
        order_of_operations,
        training,
        accelerate_prepares,
    )
}
