"""A transformers model is told which of its layers are in NF4, so that it saves and loads as the model that it is."""

from __future__ import annotations

import importlib

from torch import nn

_PRETRAINED = "transformers.modeling_utils.PreTrainedModel"


def describe_quantization(model: nn.Module) -> None:
    """Brings the config of a transformers model up to date with its layers; any other module stays as it is.

    The module that knows transformers is imported by name and only for its models: nn knows no other library.
    """
    if any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
        for base in type(model).__mro__
    ):
        importlib.import_module("qlora_kernels.integrations.quantizer").describe(model)
