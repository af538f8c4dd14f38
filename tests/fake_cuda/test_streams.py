"""Every op runs on the caller's stream: its result is complete when that stream is synchronized, in any schedule."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from tests.support.tolerances import assert_same_function

from .calls import CALLS, check_on_a_side_stream


@pytest.mark.parametrize("name", CALLS)
def test_side_stream(name: str) -> None:
    check_on_a_side_stream(name)


def test_streams_wait_for_each_other_by_events() -> None:
    """A weight is quantized on one stream and used on another after an event."""
    dense = torch.nn.Linear(96, 40, dtype=torch.bfloat16)
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    with qk.use_backend("cpu"):
        expected = qk.LinearNF4.from_linear(dense)(x)
    producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
    with qk.use_backend("cuda"):
        with torch.cuda.stream(producer):
            layer = qk.LinearNF4.from_linear(dense.cuda())
            on_device = x.cuda()
            ready = producer.record_event()
        consumer.wait_event(ready)
        with torch.cuda.stream(consumer):
            y = layer(on_device)
            consumer.synchronize()
            assert_same_function(y.cpu(), expected, products=2, terms=96)  # both sides round y
