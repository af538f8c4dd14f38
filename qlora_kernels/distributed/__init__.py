"""More than one process: what DistributedDataParallel needs of NF4 layers."""

from . import ddp as _ddp  # noqa: F401, registers the hook that prepares a model for DistributedDataParallel
