"""fuse_model over all families: the modules it replaces, unchanged outputs and gradients, and undo."""

from __future__ import annotations

import copy
import pickle

import pytest

import qlora_kernels as qk
from tests.support.decoder_families import FAMILIES, loss_and_gradients, tiny_decoder, tokens
from tests.support.tolerances import assert_same_function, assert_same_gradients

families = pytest.mark.parametrize("family", FAMILIES)
NORMS_OF_A_LAYER = {"Qwen3": 4, "Gemma2": 4, "Gemma3": 6}


@families
def test_outputs_and_gradients_unchanged(family):
    """In every family all norms, layers, attentions, MLPs and the model are replaced without a change of outputs."""
    model, ids = tiny_decoder(family), tokens()
    logits, gradients = loss_and_gradients(model, ids)
    report = qk.fuse_model(model)
    assert report.skipped == {}
    assert len(report.replaced) == 2 + 2 * (3 + NORMS_OF_A_LAYER.get(family, 2))
    fused_logits, fused_gradients = loss_and_gradients(model, ids)
    assert_same_function(fused_logits, logits)
    assert_same_gradients(fused_gradients, gradients)


def test_undo_restores_the_classes():
    model = tiny_decoder("Llama")
    classes = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    report = qk.fuse_model(model)
    assert list(model.state_dict()) == keys
    again = qk.fuse_model(model)
    assert again.replaced == {}
    assert set(again.skipped.values()) == {"fused already"}
    report.undo()
    assert [type(module) for module in model.modules()] == classes
    qk.fuse_model(model)
    assert sorted(qk.unfuse_model(model)) == sorted(report.replaced)
    assert [type(module) for module in model.modules()] == classes


def test_copies_and_pickles_stay_fused():
    model, ids = tiny_decoder("Gemma2"), tokens()
    count = len(qk.fuse_model(model).replaced)
    expected = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_function(other(ids).logits, expected)
        assert len(qk.unfuse_model(other)) == count
