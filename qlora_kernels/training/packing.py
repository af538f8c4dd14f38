"""Packing: joins several examples in one window of tokens, in which examples do not attend to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .windows import IGNORED, Example


def pack(examples: Sequence[Example], seq_len: int) -> list[Example]:
    """Join examples into windows of at most seq_len tokens, first fit, the longest example first.

    Each window keeps the lengths of its examples. From these, position ids begin at 0 in each example
    (`batches.collate`), and attention stays within each example. The first token of an example is never a label, as in
    an unpacked batch, so that the summed loss and the number of learned tokens equal those of the unpacked examples.
    The result depends only on the examples.
    """
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].input_ids), i))
    windows: list[list[int]] = []
    free: list[int] = []
    first = 0  # index of the first window that is not full
    for i in order:
        length = len(examples[i].input_ids)
        while first < len(free) and free[first] == 0:
            first += 1
        window = next((w for w in range(first, len(free)) if free[w] >= length), len(free))
        if window == len(free):
            windows.append([])
            free.append(max(seq_len, length))
        windows[window].append(i)
        free[window] -= length
    return [_joined([examples[i] for i in sorted(window)]) for window in windows]


def _joined(examples: Sequence[Example]) -> Example:
    labels = []
    for example in examples:
        labels.append(example.labels.clone())
        labels[-1][0] = IGNORED
    return Example(
        torch.cat([example.input_ids for example in examples]),
        torch.cat(labels),
        tuple(len(example.input_ids) for example in examples),
    )


@torch.no_grad()
def keeps_apart(model: nn.Module) -> bool:
    """Whether `model` computes the same for an example in a packed window as for the example alone.

    This is measured by one forward over two short examples, because some models do not accept position ids, and
    attention or a recurrent state may cross from one example to the next. The bound is far above roundings in bf16 and
    far below the effect of the other example.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    first, second = torch.arange(6, device=device), torch.arange(2, 9, device=device)

    def logits(*parts: Tensor) -> Tensor:
        """Return the logits of the last packed part."""
        position_ids = torch.cat([torch.arange(len(part), device=device) for part in parts])
        output = model(input_ids=torch.cat(parts)[None], position_ids=position_ids[None], use_cache=False)
        return cast(Tensor, output.logits[0, -len(parts[-1]) :].float())

    try:
        packed, other, alone = logits(first, second), logits(first.flip(0), second), logits(second)
    except TypeError:  # its forward does not accept position_ids
        return False
    finally:
        model.train(training)
    scale = alone.abs().max()
    return bool((packed - other).abs().max() <= 1e-3 * scale and (packed - alone).abs().max() <= 0.05 * scale)
