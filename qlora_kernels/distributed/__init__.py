"""More than one process: DistributedDataParallel, FSDP2, tensor parallelism and checkpoints of shards."""

from . import ddp as _ddp  # noqa: F401, registers the hook that prepares a model for DistributedDataParallel
from .shardable import make_shardable

__all__ = ["make_shardable"]
