"""The data stage of `qlora-kernels finetune`: examples from the data file, and what model and machine must support."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..peft import PeftConfig, PromptTuningConfig, PTuningConfig
from ..training import Corpus, Example, Record, encode_rows, language_reference, pack, read_data
from .arguments import bad_input
from .console import Console
from .finetune_options import FinetuneOptions
from .finetune_report import FinetuneReport
from .generate import check_prompt
from .limits import check_memory, check_positions, check_rank, check_token_ids, embedding_rows
from .patterns import check_patterns
from .tokenizing import ModelTokenizer, within_time


@dataclass
class DataStage:
    """Makes examples of the data of a run, and fills the report with the numbers of rows.

    note: callable that adds a note to the report and prints it.
    """

    options: FinetuneOptions
    console: Console
    report: FinetuneReport
    note: Callable[[str], None]

    def read(self) -> Corpus:
        """Return the records to train on and those that stay unseen."""
        with bad_input():
            if self.options.data == "builtin":
                return language_reference()
            corpus = read_data(self.options.data, self.options.unseen, self.options.split)
        if corpus.unused:
            self.note(f"keys of the data that are not used: {', '.join(corpus.unused)}")
        if not corpus.unseen:
            self.note("no data is kept unseen: no perplexity is measured, so the reloaded adapter is not compared")
        return corpus

    def examples(self, corpus: Corpus, tokenizer: ModelTokenizer) -> tuple[list[Example], list[Example]]:
        """Return the examples to train on, packed with --packing, and the unseen ones that are evaluated."""
        train = self._encode("train", corpus.source, corpus.train, tokenizer)
        if self.options.packing:
            windows = pack(train, self.options.seq_len)
            self.note(f"packed {len(train):,} examples into {len(windows):,} windows")
            train = windows
        unseen = self._encode("unseen", f"{corpus.source} (its unseen part)", corpus.unseen, tokenizer)
        return train, unseen[: self.options.eval_windows]

    def _encode(self, part: str, source: str, records: Sequence[Record], tokenizer: ModelTokenizer) -> list[Example]:
        if not records:
            return []
        seq_len = self.options.seq_len
        examples, rows = within_time(lambda clock: encode_rows(source, clock.timed(records), tokenizer, seq_len))
        self.report.rows[part] = rows
        self.console.say(f"{part}: {rows}")
        return examples


def check_limits(
    options: FinetuneOptions,
    adapter_config: PeftConfig,
    tokenizer: ModelTokenizer,
    model: nn.Module,
    examples: Sequence[Example],
    device: torch.device,
) -> None:
    """Raise UsageError, before any computation, if model, adapter or machine cannot process the examples.

    model: on the meta device.   examples: those to train on and the unseen ones.   device: where the model will be.
    """
    longest = max(len(example.input_ids) for example in examples)
    check_token_ids(max(int(example.input_ids.max()) for example in examples), tokenizer, model)
    check_positions(longest + virtual_tokens(adapter_config), model, "--seq-len")
    micro_batch = options.micro_batch or options.batch
    check_memory(model, batch=options.batch, micro_batch=micro_batch, longest=longest, device=device)
    rank = max(getattr(adapter_config, name, None) or 0 for name in ("r", "init_r"))
    check_rank(model, rank, device)
    check_patterns(adapter_config, model)
    if options.prompt and options.max_new_tokens:
        new_tokens = options.max_new_tokens + virtual_tokens(adapter_config)
        check_prompt(options.prompt, "--prompt", tokenizer, model, new_tokens)


def padding_id(tokenizer: ModelTokenizer, model: nn.Module) -> int:
    """Return the token id for padded positions, which are masked.

    A padding token that was only added to the tokenizer has no row in the embedding; 0 takes its place.
    """
    pad = tokenizer.pad_token_id
    return pad if pad is not None and pad < embedding_rows(model) else 0


def virtual_tokens(config: PeftConfig) -> int:
    """Return the number of positions that the method adds before every text."""
    return config.num_virtual_tokens if isinstance(config, (PromptTuningConfig, PTuningConfig)) else 0
