"""The quantization config of transformers models whose layers were quantized, merged or replaced in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .quantization_config import QLoRAKernelsConfig
from .quantized_modules import quantized_modules
from .quantizer import QLoRAKernelsQuantizer


def describe(model: Any) -> None:
    """Update a transformers model's quantization config to its present layers, as `describe_layers` says.

    A model without NF4 layers gets no config, and the config of another library's quantizer is not changed.
    Raises ValueError if experts differ in blocksize or kind of constants, which one config cannot describe.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None and quantized_modules(model):
        quantizer = QLoRAKernelsQuantizer(QLoRAKernelsConfig(), pre_quantized=False)
        quantizer.quantization_config._storage = "bitsandbytes"
        model.hf_quantizer = quantizer
    if isinstance(quantizer, QLoRAKernelsQuantizer):
        quantizer.describe_layers(model)


def write_config(model: Any, folder: Path) -> None:
    """Write config.json and generation_config.json as save_pretrained does."""
    describe(model)
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]  # fully_shard changes the class
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
