"""What --fsdp and the environment of accelerate launch mean, and the configurations that are refused."""

from __future__ import annotations

import pytest

from qlora_kernels.cli.arguments import UsageError
from qlora_kernels.cli.launcher import Sharding, sharding_of

TWO = {"WORLD_SIZE": "2"}
FSDP2 = {**TWO, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("fsdp", "environment", "expected"),
    [
        (None, TWO, None),
        (True, TWO, Sharding()),
        (None, FSDP2, Sharding()),
        (False, FSDP2, None),
        (True, {}, None),  # one process
        (None, {**FSDP2, "WORLD_SIZE": "1"}, None),
        (None, {**FSDP2, "FSDP_TRANSFORMER_CLS_TO_WRAP": "A, B"}, Sharding(("A", "B"))),
        (None, {**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "false"}, Sharding(reshard_after_forward=False)),
    ],
)
def test_sharding_follows_option_and_launcher(fsdp, environment, expected):
    assert sharding_of(fsdp, environment) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version must be 2, got 1"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params must be false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "use --gradient-checkpointing"),
    ],
)
def test_configurations_that_finetune_does_not_follow_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        sharding_of(None, {**FSDP2, **changes})
