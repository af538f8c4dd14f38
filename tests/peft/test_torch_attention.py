"""Methods on torch's own transformer layers: without transformers, and with every layout and mask."""

from __future__ import annotations

import torch
from torch import nn

from qlora_kernels.peft import PeftModel
from tests.support.tolerances import assert_same_function


def test_without_transformers():
    """On a plain nn.Transformer, in a process that cannot import transformers."""
    import subprocess
    import sys

    script = """
import sys
sys.modules["transformers"] = None
import torch
from tests.peft.cases import CASES, build
from tests.peft.models import batch, logits, randomize
for case in CASES:
    model = build(case, "torch")
    randomize(model)
    logits(model.train(), batch("torch")).sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nn_transformer_shapes_and_masks():
    """The separated projections of torch's attention equal the module for every layout, mask and kind of output."""
    for batch_first in (True, False):
        attention = nn.MultiheadAttention(16, 4, batch_first=batch_first, dropout=0.0).eval()
        x, other = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
        causal = nn.Transformer.generate_square_subsequent_mask(5)
        padding = torch.zeros(3 if batch_first else 5, 5 if batch_first else 3, dtype=torch.bool)
        padding[1, 3:] = True
        expected, found = [], []
        model = nn.ModuleList([attention])
        for collect in (expected, found):
            collect += attention_outputs(model[0], x, other, causal, padding)
            if collect is expected:
                PeftModel(model)
        for a, b in zip(expected, found, strict=True):
            assert_same_function(a, b, products=4)


def attention_outputs(attention, x, other, causal, padding):
    calls = [
        ((x, x, x), {}),
        ((x, other, other), {"need_weights": False}),
        ((x, x, x), {"key_padding_mask": padding, "average_attn_weights": False}),
        ((x[0], x[0], x[0]), {}),
    ]
    if attention.batch_first:
        calls.append(((x, x, x), {"attn_mask": causal, "is_causal": True, "need_weights": False}))
        calls.append(((x, x, x), {"attn_mask": causal.isinf()[None].expand(12, -1, -1)}))
    return [t for args, kwargs in calls for t in attention(*args, **kwargs) if t is not None]
