"""qlora-kernels chat: a conversation in the terminal with the model's chat template; answers are printed as
generated.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Subparsers, UsageError, add_command, bad_input
from .console import Console
from .generate import check_text
from .model_options import add_adapter, add_base, add_sampling

if TYPE_CHECKING:
    from torch import nn

    from .tokenizing import ModelTokenizer

_HELP = "/reset starts a new conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def add_parser(subparsers: Subparsers) -> None:
    """Add this subcommand and its options to the command line."""
    parser = add_command(
        subparsers,
        "chat",
        run,
        "talk with a model, with or without an adapter",
        f"Talk with a model in its chat template. Each line of standard input is a turn; {_HELP}. With --json each "
        "answer is a line of JSON.",
    )
    add_base(parser)
    add_adapter(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message at the start of every conversation")
    add_sampling(parser, tokens=512, tokens_help="of an answer, at most")


def run(arguments: argparse.Namespace) -> int:
    """Load the model, then answer line by line until the input ends."""
    import torch

    from ..training import write_chat
    from .model_source import load_adapter, load_base
    from .tokenizing import within_time

    console = Console(quiet=arguments.json)
    model, tokenizer = load_base(arguments, console)
    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    if arguments.system:
        check_text(arguments.system, "--system")
    with bad_input():  # before the first turn: checks that there is a template and that it accepts a system message
        probe = [*opening, {"role": "user", "content": "a"}]
        within_time(lambda clock: write_chat(tokenizer, probe, generation_prompt=True))
    if arguments.adapter is not None:
        model = load_adapter(model, arguments.adapter)
    torch.manual_seed(arguments.seed)
    console.say(_HELP)
    conversation = _Conversation(model, tokenizer, opening, arguments)
    while (line := _next_line(arguments.json)) is not None:
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            conversation.reset()
        elif line:
            conversation.answer(line)
    return 0


def _next_line(quiet: bool) -> str | None:
    """Return the next turn without surrounding spaces, or None at the end of the input."""
    if not quiet and sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input: must be text in UTF-8, got {error}") from error
    return line.strip() if line else None


class _Conversation:
    """The turns of a conversation and the model that answers."""

    def __init__(
        self, model: nn.Module, tokenizer: ModelTokenizer, opening: list[dict[str, str]], arguments: argparse.Namespace
    ) -> None:
        self.model, self.tokenizer, self.opening, self.arguments = model, tokenizer, opening, arguments
        self.reset()

    def reset(self) -> None:
        """Remove all turns but the system message."""
        self.messages = list(self.opening)

    def answer(self, text: str) -> None:
        """Print the model's answer while it is generated, and keep both turns.

        A turn that the template refuses, or that leaves no position for an answer, is left out with a message.
        """
        turn = {"role": "user", "content": text}
        try:
            reply = self._generate([*self.messages, turn])
        except UsageError as error:
            sys.stderr.write(f"{error}\n")
            return
        self.messages += [turn, {"role": "assistant", "content": reply}]
        if self.arguments.json:
            print(json.dumps({"role": "assistant", "content": reply}), flush=True)

    def _generate(self, messages: list[dict[str, str]]) -> str:
        import torch
        from transformers import StoppingCriteriaList

        from ..integrations.model_folders import as_model_error
        from ..training import TextTokens, write_chat
        from .limits import check_token_ids, max_positions
        from .streaming import AnswerStream, Interrupted
        from .tokenizing import within_time

        with bad_input():
            check_text(messages[-1]["content"], "the turn")
            prompt = within_time(lambda clock: write_chat(self.tokenizer, messages, generation_prompt=True))
            ids = within_time(lambda clock: TextTokens(self.tokenizer).ids(prompt, from_template=True))
            check_token_ids(max(ids), self.tokenizer, self.model)
        most = max_positions(self.model)
        room = self.arguments.max_new_tokens if most is None else min(self.arguments.max_new_tokens, most - len(ids))
        if room < 1:
            raise UsageError(
                f"the conversation has {len(ids)} tokens of {most} positions and leaves none for an answer; /reset"
            )
        sampling: dict[str, Any] = {"do_sample": False}
        if self.arguments.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.arguments.temperature}
        input_ids = torch.tensor([ids], device=next(self.model.parameters()).device)
        stream = AnswerStream(self.tokenizer, None if self.arguments.json else sys.stdout)
        path = Path(self.arguments.model)
        with Interrupted() as interrupted, bad_input(), as_model_error(path, "must be a model that can be run"):
            self.model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=room,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=stream,
                stopping_criteria=StoppingCriteriaList([interrupted]),
                **sampling,
            )
        return stream.text
