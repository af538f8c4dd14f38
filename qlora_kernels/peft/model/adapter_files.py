"""Adapters in folders, as save_pretrained writes and load_adapter reads them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from ...nn.quantized_weight import is_sharded
from ..core.gathered_values import is_partitioned, values_of_partitioned, with_values
from ..core.sharded import write_on_rank_zero
from ..framework import checkpoint
from ..framework.injector import Injector
from ..framework.method import methods_of
from . import adapters


def save(
    model: nn.Module,
    injector: Injector,
    directory: str | os.PathLike[str],
    names: Sequence[str],
    *,
    is_main_process: bool,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapters: "default" into the folder, any other into a folder of its name inside it.

    is_main_process: False writes nothing, except that every process takes part where parameters are sharded.
    state_dict: whole values of the parameters of `model`, which one process has gathered and writes.
    Raises ValueError for an unknown name before anything is written.
    """
    for name in names:
        methods_of(injector, name)
    folders = {"." if name == "default" else name: injector.adapters[name] for name in names}

    def parameters() -> Iterator[nn.Parameter]:
        return (p for methods in folders.values() for method in methods for p in method.parameters())

    if state_dict is None and any(is_partitioned(p) for p in parameters()):
        with with_values(model, values_of_partitioned(model)):
            write_on_rank_zero(lambda: checkpoint.save_adapters(folders, directory))
    elif state_dict is None:
        if is_main_process or any(is_sharded(p) for p in parameters()):
            checkpoint.save_adapters(folders, directory)
    elif is_main_process:
        with with_values(model, state_dict):
            if any(is_sharded(p) or is_partitioned(p) for p in parameters()):
                raise ValueError(
                    "save_pretrained: state_dict must hold every parameter of the adapters, got only some of them; "
                    "gather the trained parameters of the model (get_model_state_dict with full_state_dict=True, or "
                    "ZeRO-3's stage3_gather_16bit_weights_on_model_save)"
                )
            checkpoint.save_adapters(folders, directory)


def load(
    injector: Injector, directory: str | os.PathLike[str], name: str, *, is_trainable: bool, training: bool
) -> None:
    """Add the adapter of a folder, or load the folder's values into an existing adapter of that name.

    is_trainable: also load state that only training needs. training: whether the model is in training mode.
    Raises ValueError if the folder has another configuration than the existing adapter. An error while a new adapter is
    loaded leaves the model unchanged.
    """
    configs, files = zip(*checkpoint.load_adapter(directory), strict=True)
    if name in injector.adapters:
        methods = injector.adapters[name]
        checkpoint.require_same_configs(name, methods, files)
        trains = adapters.is_trained(injector, name)
        for method, config in zip(methods, configs, strict=True):
            method.load_config(config)
        checkpoint.load_weights(methods, files, is_trainable=is_trainable or trains)
        return
    buildable = [checkpoint.buildable(config, file, injector) for config, file in zip(configs, files, strict=True)]
    adapters.add(injector, name, buildable, training=training)
    try:
        checkpoint.load_weights(injector.adapters[name], files, is_trainable=is_trainable)
    except BaseException:
        adapters.remove(injector, name)
        raise
