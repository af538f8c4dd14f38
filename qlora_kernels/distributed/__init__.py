"""Several processes: DistributedDataParallel, FSDP2, tensor parallelism and sharded checkpoints."""

from . import ddp as _ddp  # noqa: F401, registers the hook that prepares a model for DistributedDataParallel
from .block_sharding import shard_blocks
from .shard_files import load_shards, save_shards
from .shardable import make_shardable

__all__ = ["load_shards", "make_shardable", "save_shards", "shard_blocks"]
