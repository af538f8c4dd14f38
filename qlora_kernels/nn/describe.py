"""Updates the quantization config of a transformers model, so that the model is saved and loaded with its NF4
layers.
"""

from __future__ import annotations

import importlib

from torch import nn

_PRETRAINED = "transformers.modeling_utils.PreTrainedModel"


def describe_quantization(model: nn.Module) -> None:
    """Set the config of a transformers model to describe its NF4 layers; other modules are not changed.

    The integration is imported by name, and only for transformers models, because nn does not depend on transformers.
    """
    if any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
        for base in type(model).__mro__
    ):
        importlib.import_module("qlora_kernels.integrations.quantizer").describe(model)
