"""qlora-kernels generate: continues prompts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Subparsers, UsageError, add_command, bad_input
from .console import Console
from .model_options import add_adapter, add_base, add_sampling

if TYPE_CHECKING:
    from torch import nn

    from .tokenizing import ModelTokenizer


def add_parser(subparsers: Subparsers) -> None:
    """Add this subcommand and its options to the command line."""
    parser = add_command(subparsers, "generate", run, "continue a prompt, with or without an adapter")
    add_base(parser)
    add_adapter(parser)
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's turn of a conversation")
    add_sampling(parser, tokens=64, tokens_help="stop after this many")


def run(arguments: argparse.Namespace) -> int:
    """Load the model, generate from the prompts and print the text."""
    import torch

    from ..integrations.model_folders import as_model_error
    from ..training import write_chat
    from .model_source import load_adapter, load_base
    from .tokenizing import within_time

    console = Console(quiet=arguments.json)
    base, tokenizer = load_base(arguments, console)
    model = base
    if arguments.adapter is not None:
        model = load_adapter(model, arguments.adapter)
    prompt = arguments.prompt
    check_text(prompt, "--prompt")
    if arguments.chat:
        with bad_input():
            turn = [{"role": "user", "content": prompt}]
            prompt = within_time(lambda clock: write_chat(tokenizer, turn, generation_prompt=True))
    chat = bool(arguments.chat)
    check_prompt(prompt, "--prompt", tokenizer, base, arguments.max_new_tokens, from_template=chat)
    torch.manual_seed(arguments.seed)
    with bad_input(), as_model_error(Path(arguments.model), "must be a model that can be run"):
        new_tokens = arguments.max_new_tokens
        text = continuation(model, tokenizer, prompt, new_tokens, arguments.temperature, from_template=chat)
    if arguments.json:
        print(json.dumps({"prompt": prompt, "text": text, "seconds": console.seconds}))
    else:
        print(text)
    return 0


def check_text(text: str, option: str) -> None:
    """Raise UsageError if an argument contained bytes that are not UTF-8, which Python represents as lone
    surrogates.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{option}: must be text in UTF-8, got {text[:40]!r}") from error


def check_prompt(
    prompt: str,
    option: str,
    tokenizer: ModelTokenizer,
    model: nn.Module,
    max_new_tokens: int = 1,
    *,
    from_template: bool = False,
) -> None:
    """Raise UsageError if `model` cannot continue `prompt` by that many tokens.

    option: name for the message. from_template: whether the chat template wrote the prompt.
    """
    from ..training import TextTokens
    from .limits import check_positions, check_token_ids
    from .tokenizing import within_time

    check_text(prompt, option)
    ids = within_time(lambda clock: TextTokens(tokenizer).ids(prompt, from_template=from_template))
    if not ids:
        raise UsageError(f"{option}: must hold at least one token, got an empty text")
    check_token_ids(max(ids), tokenizer, model)
    check_positions(len(ids) + max_new_tokens, model, f"{option} and --max-new-tokens")


def continuation(
    model: nn.Module,
    tokenizer: ModelTokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    *,
    from_template: bool = False,
) -> str:
    """Return the model's continuation of `prompt`, which is tokenized as in training.

    temperature: 0 for greedy.   from_template: whether the chat template wrote the prompt.
    """
    import torch

    from ..training import TextTokens

    model.eval()
    ids = TextTokens(tokenizer).ids(prompt, from_template=from_template)
    input_ids = torch.tensor([ids], device=next((p.device for p in model.parameters()), None))
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    text: str = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    return text
