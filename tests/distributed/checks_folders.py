"""Folders of transformers models: loaded into shards by rows, and written from shards."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

import qlora_kernels as qk
from qlora_kernels.distributed import load_shards, own_rows, save_shards, shard_blocks
from qlora_kernels.integrations.transformers import load_model
from tests.distributed.models import bytes_to_read
from tests.distributed.processes import Group
from tests.integrations.tiny_models import assert_same_model, build, logits
from tests.support.counted_reads import counted_reads
from tests.support.tolerances import assert_same_function

AUTO = transformers.AutoModelForCausalLM


def _in_nf4(kind: str, seed: int = 0) -> nn.Module:
    model = build(kind, seed=seed)
    qk.replace_linear(model)
    if kind == "mixtral":
        qk.replace_experts(model)
    return model.requires_grad_(False)


def _folder(group: Group, kind: str) -> Path:
    folder = group.folder / kind
    if group.rank == 0:
        _in_nf4(kind).save_pretrained(folder)
    dist.barrier()
    return folder


def folders_of_transformers(group: Group) -> None:
    """Each process reads the bytes of its shards, whatever the names in the files, and the same folder is written."""
    for kind in ("mixtral", "tied", "gpt2"):
        folder, whole = _folder(group, kind), _in_nf4(kind)
        model = _in_nf4(kind, seed=3)
        shard_blocks(model, "cpu")
        with counted_reads(own_rows) as reads:
            read = load_shards(model, folder)
        assert read == sum(reads) == bytes_to_read(model, folder / "model.safetensors"), kind
        assert_same_function(logits(model), logits(whole))
        with pytest.raises(RuntimeError, match="save_pretrained: the model must not be sharded"):
            model.save_pretrained(group.folder / "refused")
        save_shards(model, group.folder / f"{kind} again")
        if group.rank == 0:
            # transformers gives the other folders to bitsandbytes.
            read = AUTO.from_pretrained if kind == "mixtral" else partial(load_model, dtype=torch.float32)
            for again in (read(group.folder / f"{kind} again"), load_model(folder, torch.float32)):
                assert_same_model(again.eval(), whole)
        dist.barrier()


def mapped_folders(group: Group) -> None:
    """NF4 weights of every folder stay in the file until their rows are copied into shards."""
    for kind in ("mixtral", "llama"):
        folder, expected = _folder(group, kind), logits(_in_nf4(kind))
        model = load_model(folder, torch.float32, mapped=True, process=(group.rank, group.world))
        flat = [t for m in model.modules() if isinstance(m, qk.LinearNF4 | qk.ExpertsNF4) for t in m.buffers()]
        if sys.platform == "linux":
            ranges = _mapped_ranges(folder / "model.safetensors")
            large = [t for t in flat if t.numel() > 1]
            assert len(large) >= 14
            for tensor in large:
                assert any(start <= tensor.data_ptr() < end for start, end in ranges), kind
        shard_blocks(model, "cpu")
        assert_same_function(logits(model), expected)


def _mapped_ranges(file: Path) -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    ends = [line.split()[0].split("-") for line in lines if line.endswith(str(file.resolve()))]
    return [(int(start, 16), int(end, 16)) for start, end in ends]


def under_make_shardable(group: Group) -> None:
    """A model that was not sharded is saved by transformers under the names of checkpoints."""
    if group.rank == 0:
        model = qk.make_shardable(_in_nf4("mixtral"))
        model.save_pretrained(group.folder / "prepared")
        again = AUTO.from_pretrained(group.folder / "prepared").eval()
        assert_same_model(again, _in_nf4("mixtral"))
        assert all("_flat" in name for name, p in model.named_parameters() if p.dtype == torch.uint8)


CHECKS = {f.__name__: f for f in (folders_of_transformers, mapped_folders, under_make_shardable)}
