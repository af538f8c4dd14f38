"""Packed windows: what they hold, and the loss and gradient of the unpacked examples."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.training import ChunkedLoss, Example, collate, keeps_apart, pack
from qlora_kernels.training.run_state import fingerprint
from qlora_kernels.training.windows import IGNORED
from tests.peft.models import make


def examples(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in lengths:
        ids = torch.randint(0, 30, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = IGNORED
        made.append(Example(ids, labels))
    return made


def test_windows_are_filled_and_nothing_is_lost():
    given = examples(5, 3, 8, 2, 1, 4, 8)
    packed = pack(given, 8)
    assert [window.lengths for window in packed] == [(8,), (8,), (5, 3), (2, 1, 4)]
    parts = [part for window in packed for part in window.input_ids.split(window.lengths)]
    assert sorted(part.tolist() for part in parts) == sorted(example.input_ids.tolist() for example in given)
    for window in packed:
        assert all(part[0] == IGNORED for part in window.labels.split(window.lengths))
    assert fingerprint(packed) == fingerprint(pack(given, 8)) != fingerprint([p._replace(lengths=None) for p in packed])


def test_collated_positions_begin_anew_also_for_padding():
    batch = collate(pack(examples(3, 2, 4), 5), pad_token_id=7)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert batch.attention_mask is None
    assert batch.input_ids[0, 4] == 7
    assert batch.labels[0, 4] == IGNORED


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_loss_and_gradient_are_those_of_the_unpacked_examples(implementation):
    """In float64, where the order of sums does not show."""
    torch.manual_seed(0)
    model = make("llama").double()
    model.set_attn_implementation(implementation)
    assert keeps_apart(model)
    given = examples(5, 3, 8, 2, 6)
    results = []
    for batch in (collate(given), collate(pack(given, 16))):
        model.zero_grad()
        loss = ChunkedLoss(model)(batch)
        loss.backward()
        results.append((loss, batch.learned_tokens, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (whole, tokens, gradient), (packed, same_tokens, same_gradient) = results
    assert tokens == same_tokens
    torch.testing.assert_close(packed.double(), whole.double(), rtol=1e-6, atol=0)  # the sum itself is in fp32
    torch.testing.assert_close(same_gradient, gradient, rtol=1e-6, atol=1e-6)
    # A planted fault: without the positions, examples see each other.
    leaking = ChunkedLoss(model)(collate([window._replace(lengths=None) for window in pack(given, 16)]))
    assert abs(leaking.item() / whole.item() - 1) > 1e-4


class Leaking(torch.nn.Module):
    """A recurrent state that ignores positions crosses from one example to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(32, 8)

    def forward(self, input_ids, position_ids, use_cache):
        logits = self.embedding(input_ids).cumsum(1)
        return type("Output", (), {"logits": logits})


class WithoutPositions(Leaking):
    def forward(self, input_ids, use_cache):
        return super().forward(input_ids, None, use_cache)


@pytest.mark.parametrize("kind", [Leaking, WithoutPositions])
def test_models_mixing_packed_examples_are_detected(kind):
    assert not keeps_apart(kind())
