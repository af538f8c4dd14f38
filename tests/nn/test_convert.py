"""replace_linear: which layers, tied weights, the report, and clear errors."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import qlora_kernels as qk
from tests.support.problems import gaussian


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(64, 64)
        self.k_proj = nn.Linear(64, 32)
        self.norm = nn.LayerNorm(64)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(64, 100, bias=False)


def names_of(model):
    return {name for name, module in model.named_modules() if isinstance(module, qk.LinearNF4)}


EVERY = {f"layers.{i}.{p}_proj" for i in (0, 1) for p in "qk"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", EVERY),
        (["q_proj"], {"layers.0.q_proj", "layers.1.q_proj"}),
        (["0.k_proj", "layers.1.q_proj"], {"layers.0.k_proj", "layers.1.q_proj"}),
        (r"layers\.1\..*", {"layers.1.q_proj", "layers.1.k_proj"}),
        (lambda name, module: module.out_features == 32, {"layers.0.k_proj", "layers.1.k_proj"}),
    ],
    ids=["all", "suffix", "names", "regex", "predicate"],
)
def test_targets(targets, expected):
    model = Model()
    report = qk.replace_linear(model, targets=targets)
    assert names_of(model) == set(report.replaced) == expected
    assert report.skipped["lm_head"] in ("in skip", "not among targets")


def test_skip_accepts_same_patterns_as_targets():
    model = Model()
    qk.replace_linear(model, skip=r".*k_proj|lm_head")
    assert names_of(model) == {"layers.0.q_proj", "layers.1.q_proj"}


def test_a_skipped_block_is_kept_whole():
    model = Model()
    report = qk.replace_linear(model, skip=["layers.1"])
    assert names_of(model) == {"layers.0.q_proj", "layers.0.k_proj", "lm_head"}
    assert report.skipped == {"layers.1.q_proj": "in skip", "layers.1.k_proj": "in skip"}


def test_default_skip_may_match_nothing():
    qk.replace_linear(nn.Sequential(nn.Linear(64, 64)))


def test_report_counts_bytes_and_layers():
    report = qk.replace_linear(Model())
    assert report.bytes_before == 4 * 2 * (64 * 64 + 64 * 32)
    assert 7 < report.bytes_before / report.bytes_after < 8
    assert "4 layers replaced" in str(report)
    assert "kept: in skip" in str(report)


def test_head_tied_to_embedding_is_kept():
    model = Model()
    model.lm_head.weight = model.embed.weight
    report = qk.replace_linear(model, skip=())
    assert report.skipped == {"lm_head": "its weight is tied to embed.weight"}
    assert model.lm_head.weight is model.embed.weight


def test_tied_linears_share_bytes():
    model = Model()
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    report = qk.replace_linear(model)
    first, second = model.layers[0].q_proj, model.layers[1].q_proj
    assert first.packed.data_ptr() == second.packed.data_ptr()
    assert first.bias is not second.bias
    assert report.replaced["layers.1.q_proj"] == (0, 0)


def test_one_module_under_two_names_stays_one():
    model = Model()
    model.layers[1] = model.layers[0]
    qk.replace_linear(model)
    assert model.layers[0].q_proj is model.layers[1].q_proj


def test_subclasses_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(64, 64), nn.Linear(64, 64))
    qk.replace_linear(model)
    assert isinstance(model[0], Scaled)
    assert isinstance(model[1], qk.LinearNF4)


def test_no_match_error_names_nearest_layers():
    for targets in (["q_prj"], ["q_proj", "q_prj"], ["layers"]):
        with pytest.raises(
            ValueError, match=rf"targets: every name must match a linear layer, got '{targets[-1]}'.*q_proj"
        ):
            qk.replace_linear(Model(), targets=targets)
    with pytest.raises(ValueError, match=r"replace_linear: targets must match a linear layer, got 'q_prj'.*q_proj"):
        qk.replace_linear(Model(), targets="q_prj")
    with pytest.raises(ValueError, match=r"skip: every name must match a module, got 'k_prj'; nearest names: .*k_proj"):
        qk.replace_linear(Model(), skip=["k_prj", "lm_head"])
    with pytest.raises(ValueError, match=r"model must contain nn.Linear layers, got none"):
        qk.replace_linear(nn.ReLU())


def test_a_bad_weight_is_named():
    model = Model()
    with torch.no_grad():
        model.layers[1].q_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"replace_linear: layers.1.q_proj: quantize_nf4: w must be finite"):
        qk.replace_linear(model)
    assert isinstance(model.layers[1].q_proj, nn.Linear)


def test_a_weight_of_another_dtype_is_named():
    model = Model()
    model.layers[1].q_proj.double()
    with pytest.raises(TypeError, match=r"replace_linear: layers.1.q_proj: quantize_nf4: w must be float32"):
        qk.replace_linear(model)


def test_names_may_come_from_a_generator():
    """They are read more than once: to check them, and for each layer."""
    model = Model()
    report = qk.replace_linear(model, skip=(name for name in ("lm_head", "k_proj")), targets=iter(["q_proj", "k_proj"]))
    assert set(report.replaced) == {"layers.0.q_proj", "layers.1.q_proj"}
    assert isinstance(model.lm_head, nn.Linear)


@pytest.mark.parametrize("field", ["skip", "targets"])
@pytest.mark.parametrize("pattern", [None, 3, [3], b"q_proj"], ids=str)
def test_what_is_no_pattern_is_refused(field, pattern):
    with pytest.raises(TypeError, match=rf"replace_linear: {field} must be names, a regular expression or a predicate"):
        qk.replace_linear(Model(), **{field: pattern})
    with pytest.raises(TypeError, match=r"replace_experts: skip must be names"):
        qk.replace_experts(Model(), skip=pattern)


def test_what_is_no_regular_expression_is_refused():
    with pytest.raises(ValueError, match=r"targets must be names or a regular expression, got '\*proj' \(nothing to"):
        qk.replace_linear(Model(), targets="*proj")


def test_a_single_layer_is_refused():
    """It cannot be replaced in place."""
    layer = nn.Linear(64, 64)
    with pytest.raises(ValueError, match=r"got a single Linear; use LinearNF4.from_linear"):
        qk.replace_linear(layer)
    assert not list(layer.children())


@pytest.mark.parametrize("function", [qk.replace_linear, qk.replace_experts, qk.fuse_model, qk.set_merge_on_decode])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=rf"{function.__name__}: model must be an nn.Module, got str; load it first"):
        function("my-model")


def test_training_flag_and_requires_grad_survive():
    model = Model().eval()
    model.layers[0].q_proj.bias.requires_grad_(False)
    qk.replace_linear(model)
    assert not model.layers[0].q_proj.training
    assert not model.layers[0].q_proj.bias.requires_grad
    assert model.layers[1].q_proj.bias.requires_grad
    model.layers[0].q_proj(gaussian(2, 64))


def test_module_with_two_names_matches_by_either():
    model = Model()
    model.layers[1] = model.layers[0]
    report = qk.replace_linear(model, targets=["layers.1.q_proj"])
    assert set(report.replaced) == {"layers.0.q_proj", "layers.1.q_proj"}
    assert report.bytes_before == report.replaced["layers.0.q_proj"][0] > 0
    model = Model()
    model.layers[1] = model.layers[0]
    report = qk.replace_linear(model, skip=["layers.1.q_proj"])
    assert report.skipped["layers.0.q_proj"] == report.skipped["layers.1.q_proj"] == "in skip"


def test_hooks_move_to_replacement():
    model = Model()
    layer, seen = model.layers[0].q_proj, []
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    handle = layer.register_forward_hook(lambda module, args, y: seen.append("after"))
    layer.register_full_backward_hook(lambda module, grad_x, grad_y: seen.append("backward"))
    qk.replace_linear(model)
    x = torch.randn(2, model.layers[0].q_proj.in_features, requires_grad=True)
    model.layers[0].q_proj(x).sum().backward()
    assert seen == ["before", "after", "backward"]
    handle.remove()
    model.layers[0].q_proj(x)
    assert seen == ["before", "after", "backward", "before"]


def test_report_names_unmovable_attributes():
    model = Model()
    model.layers[0].q_proj.forward = lambda x: x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.layers[1].q_proj)
    report = qk.replace_linear(model)
    assert "lost: a forward that was set on the layer itself" in str(report)
    assert "a hook such as weight_norm computes it" in report.skipped["layers.1.q_proj"]
    assert type(model.layers[1].q_proj) is nn.Linear


def test_subclasses_are_kept_with_a_reason():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict({"doubled": Doubled(64, 64), "plain": nn.Linear(64, 64)})
    report = qk.replace_linear(model)
    assert names_of(model) == {"plain"}
    assert "Doubled, a subclass of nn.Linear" in report.skipped["doubled"]
    with pytest.raises(ValueError, match=r"doubled: Doubled, a subclass of nn\.Linear"):
        qk.replace_linear(model, targets=["doubled"])


def test_uninitialized_layers_are_refused():
    with pytest.raises(ValueError, match=r"replace_linear: 1 must have a weight, got an uninitialized LazyLinear"):
        qk.replace_linear(nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(8)))


def test_three_dimensional_parameters_that_are_no_experts():
    """A class token [1, 1, H], and the weights of nn.Bilinear and of a convolution with weight_norm, as in Wav2Vec2."""
    model = Model()
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 64))
    model.bilinear = nn.Bilinear(4, 4, 4)
    model.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
    assert qk.replace_linear(model).skipped.keys() == {"lm_head"}
    with pytest.raises(ValueError, match="must contain"):
        qk.replace_experts(model)


@pytest.mark.parametrize("quantized", [True, False], ids=["from NF4", "from dense"])
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "absmax"])
def test_a_model_on_the_meta_device_takes_a_checkpoint(quantized, double_quant):
    dense = Model()
    filled = copy.deepcopy(dense)
    qk.replace_linear(filled, double_quant=double_quant)
    with torch.device("meta"):
        model = Model()
    report = qk.replace_linear(model, double_quant=double_quant)
    assert report.bytes_after == sum(m.quant_state.nbytes for m in filled.modules() if isinstance(m, qk.LinearNF4))
    with pytest.warns(UserWarning, match="for weight: copying from a non-meta tensor"):
        model.layers[0].q_proj.load_state_dict({"weight": dense.layers[0].q_proj.weight}, strict=False)
    model.load_state_dict((filled if quantized else dense).state_dict(), assign=True)
    for name in EVERY:
        layer, expected = model.get_submodule(name), filled.get_submodule(name)
        assert torch.equal(layer.dequantize(), expected.dequantize())
        assert torch.equal(layer(torch.ones(1, 64)), expected(torch.ones(1, 64)))


def test_offloaded_weights_are_refused():
    model = Model()
    model.layers.to("meta")
    model.layers[0].q_proj._hf_hook = object()  # as accelerate sets it
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj: its weight must be in memory"):
        qk.replace_linear(model)
