"""qlora-kernels export: writes a model or an adapter for llama.cpp, Ollama, vLLM or transformers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .arguments import Subparsers, UsageError, add_command, bad_input
from .choices import OUTTYPES
from .console import Console
from .model_options import add_adapter, add_base


def add_parser(subparsers: Subparsers) -> None:
    """Add this subcommand and its options to the command line."""
    parser = add_command(
        subparsers,
        "export",
        run,
        "write a model or an adapter for llama.cpp, Ollama, vLLM or transformers",
        "Write what other programs load. --gguf, --ollama and --merged write the whole model, with the adapter merged "
        "as by `merge`; --lora-gguf and --vllm write the adapter alone.",
    )
    add_base(parser)
    add_adapter(parser)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--merged", type=Path, metavar="DIR", help="16-bit model folder of transformers")
    target.add_argument("--gguf", type=Path, metavar="FILE", help="model file of llama.cpp")
    target.add_argument("--ollama", type=Path, metavar="DIR", help="folder with model.gguf and Modelfile")
    target.add_argument("--lora-gguf", type=Path, metavar="FILE", help="LoRA adapter of llama.cpp")
    target.add_argument("--vllm", type=Path, metavar="DIR", help="adapter folder that vLLM serves")
    parser.add_argument("--outtype", choices=OUTTYPES, default="f16", help="of the matrices in --gguf and --ollama")
    parser.add_argument("--base", metavar="DIR|ID", help="base model that --vllm names (default: --model)")


def run(arguments: argparse.Namespace) -> int:
    """Write the model or adapter in the requested format.

    Raises UsageError if the output exists, and for an adapter format without --adapter.
    """
    console = Console(quiet=arguments.json)
    kinds = {
        "merged": _merged,
        "gguf": _gguf,
        "ollama": _ollama,
        "lora_gguf": _lora_gguf,
        "vllm": _vllm,
    }
    kind, write = next((name, write) for name, write in kinds.items() if getattr(arguments, name) is not None)
    out: Path = getattr(arguments, kind)
    option = f"--{kind.replace('_', '-')}"
    with bad_input():
        if out.exists():
            raise UsageError(f"{option}: must not exist, got {out}")
    if kind in ("lora_gguf", "vllm") and arguments.adapter is None:
        raise UsageError(f"{option}: needs --adapter, the adapter that is written")
    write(arguments, out, console)
    if arguments.json:
        print(json.dumps({"out": str(out), "kind": kind, "seconds": console.seconds}))
    else:
        print(f"{out}: written in {console.seconds:.1f} s")
    return 0


def _merged(arguments: argparse.Namespace, out: Path, console: Console) -> None:
    from ..io.atomic import folder_appearing_by_rename
    from .merge import merged_model

    model, tokenizer, _ = merged_model(arguments, console)
    with bad_input(), folder_appearing_by_rename(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _gguf(arguments: argparse.Namespace, out: Path, console: Console) -> None:
    from ..integrations.gguf_export import write_model_gguf
    from ..io.atomic import file_appearing_by_rename, make_folder
    from .merge import merged_model

    model, tokenizer, _ = merged_model(arguments, console)
    with bad_input():
        make_folder(out.parent)
        with file_appearing_by_rename(out) as partial:
            write_model_gguf(partial, model, tokenizer, arguments.outtype)


def _ollama(arguments: argparse.Namespace, out: Path, console: Console) -> None:
    from ..integrations.gguf_export import context_length, write_model_gguf
    from ..io.atomic import folder_appearing_by_rename
    from .merge import merged_model

    model, tokenizer, _ = merged_model(arguments, console)
    with bad_input(), folder_appearing_by_rename(out) as partial:
        write_model_gguf(partial / "model.gguf", model, tokenizer, arguments.outtype)
        positions = min(context_length(model.config.get_text_config()), 8192)
        (partial / "Modelfile").write_text(modelfile(positions, tokenizer.eos_token), encoding="utf-8")


def modelfile(positions: int, stop: str | None) -> str:
    """Return the Modelfile of model.gguf with `positions` as context length and the text at which an answer stops.

    Ollama's parser takes the text between quotes, or between triple quotes, as it is: it knows no escapes. Source:
    parser/parser.go in Ollama's repository.
    """
    lines = ["FROM ./model.gguf", f"PARAMETER num_ctx {positions}"]
    if stop:
        quotes = '"' * (3 if '"' in stop else 1)
        lines.append(f"PARAMETER stop {quotes}{stop}{quotes}")
    return "\n".join(lines) + "\n"


def _lora_gguf(arguments: argparse.Namespace, out: Path, _console: Console) -> None:
    from ..integrations.adapter_export import lora_factors
    from ..integrations.gguf_export import write_lora_gguf
    from ..integrations.planned_model import planned_model
    from ..io.atomic import file_appearing_by_rename, make_folder

    with bad_input():
        base = planned_model(arguments.model, ()).model
        factors, alpha = lora_factors(arguments.adapter)
        make_folder(out.parent)
        with file_appearing_by_rename(out) as partial:
            write_lora_gguf(partial, base.config, factors, alpha)


def _vllm(arguments: argparse.Namespace, out: Path, _console: Console) -> None:
    from ..integrations.adapter_export import write_vllm_adapter
    from ..io.atomic import folder_appearing_by_rename

    base: Any = arguments.base or arguments.model
    with bad_input(), folder_appearing_by_rename(out) as partial:
        write_vllm_adapter(arguments.adapter, base, partial)
