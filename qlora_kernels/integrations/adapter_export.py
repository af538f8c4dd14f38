"""Export of LoRA adapters for servers: their factors, and a folder for vLLM."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from ..io.peft_checkpoint import read_adapters
from ..nn.match import matches_ending
from .gguf_export import LoRAFactors
from .hub import is_hub_id
from .model_folders import BUILTIN_ID
from .model_structure import ModelError

_PREFIX = "base_model.model."
_BEYOND_FACTORS = (
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
"""Fields of PEFT's LoraConfig with which an adapter is more than low-rank updates of linear layers."""
_INITS_THAT_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal", "lora_ga", "mica")
"""Values of init_lora_weights, beside true and false, with which a saved adapter fits the original base weights."""
_FACTOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")


def lora_factors(folder: Path) -> tuple[dict[str, LoRAFactors], float]:
    """Return the factors of each layer of a LoRA adapter, and the adapter's lora_alpha.

    folder: in PEFT's layout. Raises ModelError if the adapter contains anything but low-rank updates of linear layers.
    """
    config, tensors = _plain_lora(folder)
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise ModelError(f"export: {folder} must hold lora_A and lora_B of linear layers alone, got {name}")
        parts.setdefault(match["layer"], {})[match["factor"]] = tensor
    alpha = float(config["lora_alpha"])
    factors = {}
    for layer, part in parts.items():
        if part.keys() != {"A", "B"}:
            raise ModelError(f"export: {folder} must hold lora_A and lora_B of {layer}, got one of them")
        of_layer = _by_pattern(config.get("alpha_pattern") or {}, layer, alpha)
        rank = len(part["A"])
        scaling = of_layer / (math.sqrt(rank) if config.get("use_rslora") else rank)
        factors[layer] = LoRAFactors(part["A"], part["B"], scaling)
    return factors, alpha


def write_vllm_adapter(folder: Path, base: str, target: Path) -> None:
    """Write an adapter for vLLM, with the last parts of names in target_modules and a base model that vLLM can load.

    folder: in PEFT's layout.   base: id on the hub, a model folder, or "builtin".   target: an empty folder.
    Raises ModelError if vLLM would refuse the adapter or compute another function.
    """
    from safetensors.torch import save_file

    config, tensors = _plain_lora(folder)
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ModelError("export: vLLM takes one r and one lora_alpha, got rank_pattern or alpha_pattern; use --merged")
    factors, _ = lora_factors(folder)
    config["target_modules"] = sorted({layer.rpartition(".")[2] for layer in factors})
    config["base_model_name_or_path"] = _real_base(base)
    config["inference_mode"] = True
    config.pop("exclude_modules", None)
    config.pop("layers_to_transform", None)
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / "adapter_model.safetensors")


def _plain_lora(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (adapter_config.json, tensors under PEFT's names) of an adapter that consists of LoRA only."""
    found = read_adapters(folder)
    if len(found) != 1 or found[0].config.get("peft_type") != "LORA":
        kinds = [files.config.get("peft_type") for files in found]
        raise ModelError(f"export: {folder} must be one LoRA adapter, got {kinds}; use --merged or --gguf")
    config = dict(found[0].config)
    for field, plain in (("use_dora", False), ("bias", "none"), ("modules_to_save", None), ("fan_in_fan_out", False)):
        if (config.get(field) or plain) != plain:
            raise ModelError(f"export: {field} must be {plain}, got {config[field]}; use --merged or --gguf")
    for field in _BEYOND_FACTORS:
        if config.get(field):
            raise ModelError(f"export: {field} must not be set, got {config[field]}; use --merged or --gguf")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _INITS_THAT_KEEP_THE_BASE:
        raise ModelError(
            f"export: init_lora_weights must keep the base weights, got {init!r}, whose adapter fits changed base "
            "weights alone; use --merged or --gguf"
        )
    tensors = {
        name if name.startswith(_PREFIX) else f"{_PREFIX}{name}": tensor for name, tensor in found[0].tensors.items()
    }
    return config, tensors


def _by_pattern(patterns: dict[str, float], layer: str, default: float) -> float:
    """Return the value of the first pattern that matches the layer, as PEFT reads alpha_pattern."""
    return next((float(value) for key, value in patterns.items() if matches_ending(key, layer)), default)


def _real_base(base: str) -> str:
    """Return the base model as an absolute path or an id on the hub."""
    if base == "builtin":
        return BUILTIN_ID
    path = Path(base)
    if path.is_dir():
        return str(path.resolve())
    if path.suffix == ".gguf" or not is_hub_id(base):
        raise ModelError(
            f"export: the base model must be a folder that exists or an id on the hub, got {base}; name it by --base"
        )
    return base
