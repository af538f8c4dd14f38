"""Whether the NF4 layers of a transformers model keep their values when bitsandbytes loads the saved model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..nn.functional_use import read_but_never_called
from ..nn.linear_nf4 import LinearNF4
from .quantized_modules import owner_of

_FALCON = "transformers.models.falcon.modeling_falcon"


def loads_in_bitsandbytes(model: nn.Module, layers: Mapping[str, LinearNF4], dense: Iterable[str]) -> bool:
    """Whether transformers loads each of `layers` with bitsandbytes, and bitsandbytes computes its values.

    dense: names of the layers that stay dense.
    """
    # transformers 5.0 is without this function at import time.
    from transformers.quantizers.quantizers_utils import should_convert_module

    # transformers leaves out layers that the model keeps in float32 (T5's wo), and those whose names end like the name
    # of a skipped one.
    skip = [*dense, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    read = read_but_never_called(model)  # bitsandbytes' weight is codes, and such models compute with it
    return not any(
        _has_misread_shape(layer)
        or name in read
        or not should_convert_module(name, skip)
        or _replaces_subclass_of_linear(model, name)
        for name, layer in layers.items()
    )


def _has_misread_shape(layer: LinearNF4) -> bool:
    """Whether bitsandbytes' CPU code dequantizes the weight to wrong values (docs/format.md)."""
    return layer.in_features % 16 == 0 and layer.in_features % layer.blocksize != 0


def _replaces_subclass_of_linear(model: nn.Module, name: str) -> bool:
    """Whether the dense layer was Falcon's subclass of nn.Linear; transformers' bitsandbytes leaves subclasses dense.

    replace_linear replaces no other subclass.
    """
    return type(owner_of(model, name)[0]).__module__ == _FALCON
