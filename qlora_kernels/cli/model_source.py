"""The dense folder, the NF4 folder and the loaded model of --model. The folders are made once and kept in a cache."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..integrations.model_folders import (
    convert_gguf,
    is_quantized,
    load_model,
    load_tokenizer,
    quantize_model,
    resolve_model,
)
from ..io.model_cache import cached_folder
from ..io.streaming import StreamReport
from ..peft import PeftModel
from ..peft.framework import checkpoint
from .arguments import bad_input, dtype_of
from .console import Console
from .device import chosen_device, chosen_dtype
from .patterns import check_patterns


def load_base(arguments: argparse.Namespace, console: Console) -> tuple[nn.Module, Any]:
    """Return (model, tokenizer): the model in NF4, or dense with --dense, on the device of --device.

    An --adapter that cannot be read raises before the model is converted and loaded.
    """
    if getattr(arguments, "adapter", None) is not None:
        with bad_input():
            checkpoint.load_adapter(arguments.adapter)
    device = chosen_device(arguments.device, os.environ)
    dtype = dtype_of(chosen_dtype(arguments.compute_dtype, device))
    with tempfile.TemporaryDirectory() as scratch:
        cache = arguments.cache or Path(scratch)
        folder = dense_folder(arguments.model, cache, console)
        if not arguments.dense:
            folder = nf4_folder(
                folder,
                cache,
                console,
                skip=arguments.skip,
                blocksize=arguments.blocksize,
                double_quant=arguments.double_quant,
                compute_dtype=dtype,
            )
        with bad_input():
            return load_model(folder, dtype, device), load_tokenizer(folder)


def load_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """Return `model` with the adapter in a folder, for inference."""
    with bad_input():
        for config, _ in checkpoint.load_adapter(folder):
            check_patterns(config, model)
        return PeftModel.from_pretrained(model, folder)


def dense_folder(model: str, cache: Path, console: Console) -> Path:
    """Return the model's dense folder; for a GGUF file, a folder in the cache, in bf16."""
    with bad_input():
        source = resolve_model(model)
        if source.is_dir():
            return source
        console.say(f"base model: {source.name}")
        with console.stage("convert"):
            folder, cached = cached_folder(
                cache, "bf16", source, {"dtype": "bfloat16"}, lambda partial: convert_gguf(source, partial)
            )
    console.say(f"dequantized to bf16{' earlier' if cached else ''}: {folder}")
    return folder


def nf4_folder(
    dense: Path,
    cache: Path,
    console: Console,
    *,
    skip: Sequence[str],
    blocksize: int,
    double_quant: bool,
    compute_dtype: torch.dtype,
) -> Path:
    """Return the NF4 folder made from `dense`, in the cache, or `dense` if it is already in NF4."""
    with bad_input():
        if is_quantized(dense):
            return dense
        settings = {"blocksize": blocksize, "double_quant": double_quant, "skip": sorted(skip)}

        def make(partial: Path) -> None:
            quantize_with_bar(
                dense,
                partial,
                console,
                skip=skip,
                blocksize=blocksize,
                double_quant=double_quant,
                compute_dtype=compute_dtype,
            )

        with console.stage("quantize"):
            folder, cached = cached_folder(cache, "nf4", dense, settings, make)
    console.say(f"quantized to NF4{' earlier' if cached else ''}: {folder}")
    return folder


def quantize_with_bar(
    dense: Path,
    target: Path,
    console: Console,
    *,
    skip: Sequence[str],
    blocksize: int,
    double_quant: bool,
    compute_dtype: torch.dtype,
    device: torch.device | None = None,
) -> StreamReport:
    """Run quantize_model with a progress bar over the layers."""
    with console.bar(0, "quantizing", "layer") as bar:
        return quantize_model(
            dense,
            target,
            skip=skip,
            blocksize=blocksize,
            double_quant=double_quant,
            compute_dtype=compute_dtype,
            device=device,
            on_layers=bar.reset,
            on_layer=bar.update,
        )
