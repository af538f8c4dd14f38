"""The ranks of an AdaLoRA adapter, by layer."""

from __future__ import annotations

from ..methods.adalora import AdaLora
from .peft_model import PeftModel


def adalora_ranks(model: PeftModel, adapter_name: str = "default") -> dict[str, int]:
    """Return layer name -> number of kept triplets, which is final after step(total_step - tfinal).

    Raises ValueError if there is no such adapter or it does not use AdaLoRA.
    """
    methods = model.injector.adapters.get(adapter_name, [])
    deltas = [item for method in methods if isinstance(method, AdaLora) for item in method.deltas.items()]
    if not deltas:
        raise ValueError(f"adalora_ranks: adapter {adapter_name!r} must be an AdaLoRA adapter")
    return {path: int(delta.kept.sum()) for path, delta in deltas}
