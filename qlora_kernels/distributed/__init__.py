"""Several processes: DistributedDataParallel, FSDP2, tensor parallelism and sharded checkpoints."""

from . import ddp as _ddp  # noqa: F401, registers the hook that prepares a model for DistributedDataParallel
from .shard_blocks import blocks_of, held_bytes_of, shard_blocks
from .shard_files import load_shards, save_shards
from .shardable import check_torch, make_shardable

__all__ = [
    "blocks_of",
    "check_torch",
    "held_bytes_of",
    "load_shards",
    "make_shardable",
    "save_shards",
    "shard_blocks",
]
