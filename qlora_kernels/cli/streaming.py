"""Output of an answer while it is generated, and its interruption by Ctrl-C."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, TextIO

import torch
from transformers import TextStreamer


class AnswerStream(TextStreamer):
    """Writes the text of an answer as generate produces it.

    file: the output, or None for no output.   text: the whole text so far.
    """

    def __init__(self, tokenizer: Any, file: TextIO | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.file = file
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write the next part of the text, which later tokens do not change."""
        self.text += text
        if self.file is not None:
            self.file.write(text + ("\n" if stream_end else ""))
            self.file.flush()


class Interrupted:
    """A stopping criterion of generate and a context in which Ctrl-C ends the answer at its next token, not the
    command.
    """

    def __init__(self) -> None:
        self.raised = False
        self._before: Any = None

    def __enter__(self) -> Interrupted:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.raised = True

    def __call__(self, input_ids: torch.Tensor, _scores: object, **_options: object) -> torch.Tensor:
        """Return for each sequence whether generation ends."""
        return torch.full((len(input_ids),), self.raised, dtype=torch.bool, device=input_ids.device)
