"""Models after fuse_model, whose attention and MLP are one autograd node each, in several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_kernels as qk
from qlora_kernels.distributed import shard_blocks
from qlora_kernels.distributed.tensor_parallel import ColwiseNF4, RowwiseNF4
from qlora_kernels.nn import fused_attention, fused_mlp
from qlora_kernels.peft import LoraConfig, get_peft_model
from tests.distributed.models import gradients, trained
from tests.distributed.processes import Group
from tests.support.tolerances import assert_same_gradients

IDS = torch.randint(1, 48, (4, 10), generator=torch.Generator().manual_seed(0))
COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
PLAN = {name: ColwiseNF4() for name in COLUMNS} | {n: RowwiseNF4() for n in ("self_attn.o_proj", "mlp.down_proj")}


def _model(*, checkpointing: bool = False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    qk.replace_linear(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(model).values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    qk.fuse_model(model, attention=True)
    return model.train()


class _nodes:
    """Counts the calls of the nodes that compute a whole attention module or MLP."""

    def __enter__(self) -> list[str]:
        self.calls: list[str] = []
        self.originals = {(m, name): getattr(m, name) for m, name in _NODES}
        for (module, name), original in self.originals.items():
            setattr(module, name, lambda *a, _name=name, _original=original: self.calls.append(_name) or _original(*a))
        return self.calls

    def __exit__(self, *_: object) -> None:
        for (module, name), original in self.originals.items():
            setattr(module, name, original)


_NODES = ((fused_attention, "lora_attention"), (fused_mlp, "gated_mlp"))


def _expected():
    model = _model()
    with _nodes() as calls:
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert len(calls) == 4, calls
    return gradients(model)


def _part(group: Group) -> dict[str, Any]:
    ids = IDS.chunk(group.world)[group.rank]
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def fused_under_ddp(group: Group) -> None:
    for checkpointing in (False, True):
        model = _model(checkpointing=checkpointing)
        wrapped = DistributedDataParallel(model)
        with _nodes() as calls:
            wrapped(**_part(group)).loss.backward()
        assert len(calls) == (8 if checkpointing else 4), calls
        assert_same_gradients(gradients(model), _expected())


def fused_under_fsdp(group: Group) -> None:
    for checkpointing in (False, True):
        model = _model(checkpointing=checkpointing)
        shard_blocks(model, "cpu")
        with _nodes() as calls:
            model(**_part(group)).loss.backward()
        assert len(calls) == (8 if checkpointing else 4), calls
        assert_same_gradients(gradients(model), _expected())


def fused_and_compiled(group: Group) -> None:
    """Compiled blocks run the projections one by one, over shardable weights too."""
    model = qk.make_shardable(_model())
    for block in model.get_base_model().model.layers:
        block.compile(backend="eager")
    shard_blocks(model, "cpu")
    model(**_part(group)).loss.backward()
    assert_same_gradients(gradients(model), _expected())


def fused_under_tensor_parallelism(group: Group) -> None:
    """Parallel layers are called one by one; the gradients are those of one process."""
    model = _model()
    mesh = init_device_mesh("cpu", (group.world,))
    for block in model.get_base_model().model.layers:
        parallelize_module(block, mesh, PLAN)
    with _nodes() as calls:
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert not calls, calls
    assert_same_gradients(gradients(model), _expected())


CHECKS = {
    f.__name__: f for f in (fused_under_ddp, fused_under_fsdp, fused_and_compiled, fused_under_tensor_parallelism)
}
