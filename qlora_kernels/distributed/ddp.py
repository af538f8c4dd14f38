"""DistributedDataParallel over NF4 layers: the weights are broadcast once, when the wrapper is made.

DistributedDataParallel broadcasts every buffer of the model in every forward. Therefore the NF4 tensors of a model
become frozen parameters when it is wrapped; state dicts keep their names. Buffers that every process computes alike and
that never change, such as VeRA's matrices, are left out of the broadcasts. The wrapper is detected by torch's global
hook on the registration of submodules, for NF4 layers at any depth.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from ..nn.quantized_weight import QuantizedWeight


def freeze_into_parameters(model: nn.Module) -> list[QuantizedWeight]:
    """Move the tensors of every NF4 module from buffers to frozen parameters, and return the modules."""
    known: dict[int, nn.Parameter] = {}
    found = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    for module in found:
        module.move_to_parameters(known)
    return found


def _prepare(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if isinstance(parent, DistributedDataParallel) and name == "module" and child is not None:
        freeze_into_parameters(child)
        parent.parameters_to_ignore |= _constants(child)


def _constants(model: nn.Module) -> set[str]:
    """Return the names of the buffers in modules that declare them constant."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules(remove_duplicate=False)
        if getattr(module, "buffers_never_change", False)
        for name, _ in module.named_buffers(recurse=False)
    }


register_module_module_registration_hook(_prepare)
