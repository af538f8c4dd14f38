"""Prints, pickled, the inputs of torch's tests of AdamW: ([kwargs], [(kwargs, params, error, pattern)]).

It runs in a separate process, because importing torch.testing's internals freezes the flags of torch.backends and takes
seconds.
"""

from __future__ import annotations

import sys
import types
import unittest
from typing import Any

import torch


def inputs() -> tuple[list[dict[str, Any]], list[tuple[Any, ...]]]:
    """Return the inputs in torch.testing._internal.common_optimizers, whose import needs an otherwise unused
    package."""
    stub: Any = types.ModuleType("expecttest")
    stub.TestCase, stub.assert_expected_inline = unittest.TestCase, None
    sys.modules.setdefault("expecttest", stub)
    from torch.testing._internal import common_optimizers as common

    good = [each.kwargs for each in common.optim_inputs_func_adamw("cpu")]
    bad = []
    for each in common.optim_error_inputs_func_adamw("cpu", torch.float32):
        given = each.optimizer_error_input
        bad.append((given.kwargs, given.params, each.error_type, each.error_regex))
    return good, bad


if __name__ == "__main__":
    torch.save(inputs(), sys.argv[1])
