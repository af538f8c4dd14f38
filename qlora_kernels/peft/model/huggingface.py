"""Recognition by transformers' Trainer, TRL and accelerate, which call isinstance(model, peft.PeftModel).

The result determines which forward signature they inspect, whether checkpoints hold only adapters, how checkpoints are
loaded, and which model is DPO's reference. PeftModel has the methods that they then use (get_base_model,
disable_adapter, set_adapter, load_adapter, save_pretrained, peft_config, active_adapters).
"""

from __future__ import annotations

import json
import sys
from functools import cache, partial, wraps
from typing import Any, cast

from ..core.config import PeftConfig
from ..framework.registry import config_from_dict
from . import peft_functions


class RecognizedAsPeftModel:
    """Makes isinstance(model, peft.PeftModel) true if peft has been imported, before or after the model was made.

    As in proxies, `__class__` returns a class that derives from both. The type of the model does not change, so that no
    code of PEFT runs in it. PEFT is not imported here.
    """

    @property
    def __class__(self) -> Any:
        _serve_label_smoothing()  # Trainer's constructor asks for the class
        theirs = getattr(sys.modules.get("peft"), "PeftModel", None)
        if hasattr(sys.modules.get("peft"), "set_peft_model_state_dict"):  # not while peft is being imported
            peft_functions.extend(sys.modules["peft"], RecognizedAsPeftModel)
        return type(self) if theirs is None else _both(cast(Any, type(self)), theirs)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        object.__dict__["__class__"].__set__(self, kind)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle compares the class in the result of object.__reduce_ex__ with __class__.
        _, arguments, *state = cast("tuple[Any, ...]", super().__reduce_ex__(max(int(protocol), 2)))
        return (_new, arguments, *state)


@cache
def _both(ours: Any, theirs: Any) -> Any:
    if issubclass(ours, theirs):
        return ours
    names = {"__module__": ours.__module__, "__qualname__": ours.__qualname__, "__doc__": ours.__doc__}
    return type(ours.__name__, (ours, theirs), names)


def _new(kind: Any) -> Any:
    return kind.__new__(kind)


def _serve_label_smoothing() -> None:
    """Make Trainer's label_smoothing_factor right for models of this package, once transformers has loaded Trainer."""
    module = sys.modules.get("transformers.trainer")
    if module is not None and hasattr(module, "Trainer"):
        _shift_smoothed_labels(module)


@cache
def _shift_smoothed_labels(module: Any) -> None:
    """Replace Trainer.compute_loss of the module transformers.trainer by one that knows this package's models.

    To decide whether labels are shifted, Trainer asks model.base_model.model for the name of its class. In PEFT's LoRA
    models that is the causal model; here, and in PEFT's own prompt methods, it is the decoder inside it, or missing.
    """
    original = module.Trainer.compute_loss

    @wraps(original)
    def compute_loss(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.label_smoother is None or self.compute_loss_func is not None:
            return original(self, model, *args, **kwargs)
        unwrapped = self.accelerator.unwrap_model(model)
        if not issubclass(type(unwrapped), RecognizedAsPeftModel):
            return original(self, model, *args, **kwargs)
        shifts = type(unwrapped.get_base_model()).__name__ in module.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        self.compute_loss_func = partial(self.label_smoother, shift_labels=shifts)
        try:
            return original(self, model, *args, **kwargs)
        finally:
            self.compute_loss_func = None

    module.Trainer.compute_loss = compute_loss


def check_save_options(safe_serialization: bool) -> None:
    """Raise for an argument of save_pretrained that is not supported."""
    if not safe_serialization:
        raise ValueError("save_pretrained: safe_serialization must be True, got False; pickled files are not written")


def is_of_peft(config: Any) -> bool:
    """Whether `config` is a configuration of Hugging Face PEFT, such as peft.LoraConfig(r=8)."""
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(config).__mro__)


def config_of_peft(config: Any) -> PeftConfig:
    """Return a configuration of Hugging Face PEFT as the one with the same fields here.

    Raises ValueError for a type of adapter that is not here, and NotImplementedError for options that it does not have.
    """
    return config_from_dict(json.loads(json.dumps(config.to_dict(), default=list)))
