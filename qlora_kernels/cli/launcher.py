"""What torchrun and `accelerate launch` say in environment variables about sharding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .arguments import UsageError


@dataclass(frozen=True)
class Sharding:
    """The arguments of distributed.shard_blocks.   block_classes: empty for the model's own."""

    block_classes: tuple[str, ...] = ()
    reshard_after_forward: bool = True


def processes(environment: Mapping[str, str]) -> int:
    """Return the number of processes of the run."""
    return int(environment.get("WORLD_SIZE", "1"))


def sharding_of(fsdp: bool | None, environment: Mapping[str, str]) -> Sharding | None:
    """Return how the model is sharded over the processes, or None if each of them holds the whole model.

    fsdp: --fsdp; None follows the launcher, which is `accelerate launch` with an FSDP2 configuration.
    environment: of the process.
    Raises UsageError for a configuration with settings that `finetune` does not support.
    """
    by_launcher = _is_true(environment, "ACCELERATE_USE_FSDP")
    if fsdp is False or processes(environment) == 1 or not (fsdp or by_launcher):
        return None
    if not by_launcher:
        return Sharding()
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise UsageError(f"accelerate launch: fsdp_version must be 2, got {version}; set it in its FSDP configuration")
    policy = environment.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if policy not in ("TRANSFORMER_BASED_WRAP", "NO_WRAP"):
        raise UsageError(f"accelerate launch: fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP, got {policy}")
    for variable, instead in (
        ("FSDP_OFFLOAD_PARAMS", "leave it out, because NF4 weights are 4 bits wide"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "use --gradient-checkpointing"),
    ):
        if _is_true(environment, variable):
            raise UsageError(f"accelerate launch: {variable.lower()} must be false, got true; {instead}")
    names = environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    classes = tuple(name.strip() for name in names.split(",") if name.strip())
    keeps = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in ("false", "shard_grad_op")
    return Sharding(classes, not keeps)


def _is_true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("true", "1", "yes")
