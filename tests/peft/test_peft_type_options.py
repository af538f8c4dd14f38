"""Options, dropout, limits and errors of PEFT's adapter types; test_peft_types.py compares outputs."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from qlora_kernels import peft
from qlora_kernels.peft import PeftModel, get_peft_model
from qlora_kernels.peft.methods import ia3, lokr, rotation
from tests.peft.models import batch, logits, make, randomize
from tests.support.tolerances import assert_same_function, assert_same_gradients


def test_ia3_default_layers_equal_peft():
    """For each type of model that PEFT lists."""
    constants = pytest.importorskip("peft.utils.constants")
    targets, feedforward = (
        getattr(constants, f"TRANSFORMERS_MODELS_TO_IA3_{which}_MODULES_MAPPING") for which in ("TARGET", "FEEDFORWARD")
    )
    ours = {kind: pair for pair, kinds in ia3._DEFAULTS.items() for kind in kinds.split()}
    assert ours == {kind: (tuple(targets[kind]), tuple(feedforward[kind])) for kind in targets}


def test_ia3_over_all_linear_layers_loads_in_peft(hf_peft, tmp_path):
    model = get_peft_model(make("llama"), peft.IA3Config(target_modules="all-linear")).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    theirs = hf_peft.PeftModel.from_pretrained(make("llama"), tmp_path).eval()
    with torch.no_grad():
        assert_same_function(logits(theirs, batch("llama")), logits(model, batch("llama")))


def test_bad_ia3_configurations_are_named():
    with pytest.raises(ValueError, match=r"feedforward_modules must be some of target_modules, got \['fc'\]"):
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=["fc"])
    with pytest.raises(ValueError, match="target_modules and feedforward_modules: must be given for a model of type"):
        get_peft_model(make("torch"), peft.IA3Config())
    with pytest.raises(ValueError, match="feedforward_modules: must be given for a model of type"):
        get_peft_model(make("torch"), peft.IA3Config(target_modules="all-linear"))


def test_lokr_divides_sizes_as_peft(hf_peft):
    from peft.tuners.lokr.layer import factorization

    for dimension in (*range(1, 65), 97, 1024, 11008):
        for factor in (-1, 1, 3, 4, 8, 16, 100):
            assert lokr.factorization(dimension, factor) == factorization(dimension, factor)


@pytest.mark.parametrize(
    "options",
    [{"module_dropout": 0.5}, {"rank_dropout": 0.3, "module_dropout": 0.2}],
    ids=lambda options: "+".join(options),
)
@pytest.mark.parametrize("name", ["LoHaConfig", "LoKrConfig"])
def test_lycoris_dropout_is_pefts(hf_peft, name, options):
    """Equal random numbers drop equal parts of the update in training; nothing is dropped in inference."""
    scale = {"rank_dropout_scale": True} if name == "LoKrConfig" else {}
    options = options | {"r": 2, "init_weights": False, "target_modules": ["q_proj", "up_proj"]} | scale
    outputs = []
    for model in (
        get_peft_model(make("llama"), getattr(peft, name)(**options)),
        hf_peft.get_peft_model(make("llama"), getattr(hf_peft, name)(**options)),
    ):
        randomize(model.eval())
        used = logits(model, batch("llama"))
        torch.manual_seed(5)
        outputs.append((used, logits(model.train(), batch("llama"))))
    for ours, theirs in zip(*outputs, strict=True):
        assert_same_function(ours, theirs)
    assert (outputs[0][0] - outputs[0][1]).abs().max() > 1e-4


def test_lycoris_dropout_of_everything_is_finite():
    model = get_peft_model(make("llama"), peft.LoHaConfig(r=2, rank_dropout=0.999)).train()
    randomize(model)
    assert torch.isfinite(logits(model, batch("llama"))).all()


def test_lokr_computes_no_dense_update(monkeypatch):
    """The Kronecker product itself is computed only for merges."""
    model = get_peft_model(make("llama"), peft.LoKrConfig(r=2, target_modules="all-linear")).eval()
    monkeypatch.delattr(torch, "kron")
    logits(model, batch("llama"))


def test_loha_of_low_rank_and_vera_run_fused():
    """For r * r (N + K) <= N K, the update has rank r * r, and its factors are used in the fused op."""
    for config in (
        peft.LoHaConfig(r=2, target_modules="all-linear"),
        peft.VeraConfig(r=4, target_modules="all-linear"),
    ):
        model = get_peft_model(make("llama", nf4=True), config)
        assert set(model.explain().values()) == {"fused"}
    wide = get_peft_model(make("llama", nf4=True), peft.LoHaConfig(r=6, target_modules="all-linear"))
    assert all("not a plain low-rank update" in answer for answer in wide.explain().values())


def test_vera_projections_are_held_and_saved_once(tmp_path):
    """All layers share them, also in copies and in a run's state; they come from the seed or from the file."""
    config = peft.VeraConfig(r=4, target_modules=["q_proj", "up_proj"], projection_prng_key=3)
    model = get_peft_model(make("llama"), config)
    for each in (model, copy.deepcopy(model)):
        method = each.adapters["default"][0]
        assert {id(delta.projection) for delta in method.deltas.values()} == {id(method.projection)}
        assert sum("vera_A" in name for name in method.training_state()[1]) == 1
    with torch.no_grad():
        model.adapters["default"][0].projection.vera_A.mul_(2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert torch.equal(again.adapters["default"][0].projection.vera_A, model.adapters["default"][0].projection.vera_A)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "save_projection": False}))
    with pytest.warns(UserWarning, match="adapter_config"):
        again = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert torch.equal(again.adapters["default"][0].projection.vera_A, model.adapters["default"][0].projection.vera_A)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("VeraConfig", {"r": 0}, "r must be >= 1"),
        ("VeraConfig", {"vera_dropout": 1.0}, "vera_dropout must be in"),
        ("VeraConfig", {"bias": "lora_only"}, "bias must be 'none', 'all' or 'vera_only'"),
        ("LoHaConfig", {"rank_pattern": {"q_proj": 0}}, "r must be >= 1"),
        ("LoKrConfig", {"module_dropout": -0.1}, "module_dropout must be in"),
        ("LoKrConfig", {"decompose_factor": 0}, "decompose_factor must be -1 or >= 1"),
        ("LoKrConfig", {"init_weights": "lyco"}, "init_weights must be a bool or 'lycoris'"),
        ("OFTConfig", {"r": 4}, "oft_block_size must be 0 or r, which is 4, must be, got 32"),
        ("OFTConfig", {"oft_block_size": 0}, "oft_block_size must be 0 or r"),
        ("OFTConfig", {"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms must be >= 1"),
        ("OFTConfig", {"eps": 0.0}, "eps must be > 0"),
        ("BOFTConfig", {"boft_block_num": 2}, "boft_block_num must be 0 or boft_block_size"),
        ("BOFTConfig", {"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor must be >= 1"),
        ("BOFTConfig", {"bias": "oft_only"}, "bias must be 'none', 'all' or 'boft_only'"),
    ],
    ids=str,
)
def test_bad_values_are_named(name, options, message):
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        getattr(peft, name)(**options)


@pytest.mark.filterwarnings("ignore:.*adapter_config.json")
@pytest.mark.parametrize(
    ("name", "change"),
    [("VeraConfig", {"r": 10**9}), ("LoHaConfig", {"rank_pattern": {"q_proj": 10**9}}), ("LoKrConfig", {"r": 1})],
)
def test_files_with_another_rank_are_refused(tmp_path, name, change):
    get_peft_model(make("llama"), getattr(peft, name)(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(ValueError, match=r"must be that of its tensors|another shape"):
        PeftModel.from_pretrained(make("llama"), tmp_path)


@pytest.mark.parametrize("terms", range(1, 8))
def test_cayley_neumann_sums_are_pefts(hf_peft, terms):
    from peft.tuners.oft.layer import OFTRotationModule

    theirs = OFTRotationModule(2, 15, 6, 12)
    torch.nn.init.normal_(theirs.weight, std=0.1)
    skew = theirs._pytorch_skew_symmetric(theirs.weight, 6)
    expected = theirs._cayley_batch(theirs.weight, 6, True, terms)
    assert_same_function(rotation.cayley_neumann(skew, terms), expected)


@pytest.mark.parametrize(
    ("field", "wanted", "size"), [("oft_block_size", 12, 8), ("oft_block_size", 99, 32), ("r", 5, 8)]
)
def test_oft_uses_nearest_divisor(hf_peft, field, wanted, size):
    """Of the 32 inputs of the layer, as PEFT does it."""
    options = {"oft_block_size": 0, "target_modules": ["q_proj"], field: wanted}
    with pytest.warns(UserWarning, match=f"{field}: {wanted} does not divide the 32 inputs of model.layers.0"):
        model = get_peft_model(make("llama", layers=1), peft.OFTConfig(**options))
    theirs = hf_peft.get_peft_model(make("llama", layers=1), hf_peft.OFTConfig(**options))
    shapes = [[p.shape for p in each.parameters() if p.requires_grad] for each in (model, theirs)]
    assert shapes[0] == shapes[1] == [(32 // size, size * (size - 1) // 2)]


def test_coft_training_keeps_the_blocks_near_the_identity():
    config = peft.OFTConfig(oft_block_size=8, coft=True, eps=0.1, target_modules=["q_proj"])
    model = get_peft_model(make("llama", layers=1), config)
    randomize(model)
    weight = next(p for p in model.parameters() if p.requires_grad)
    before = weight.detach().clone()
    y = logits(model.eval(), batch("llama"))
    assert torch.equal(weight, before), "only training moves the parameter"
    assert_same_function(logits(model.train(), batch("llama")), y)
    assert (2**0.5 * weight.detach().norm(dim=1)).max() <= 0.1 / 2 * (1 + 1e-5)


def test_files_of_the_old_oft_are_refused(tmp_path):
    get_peft_model(make("llama"), peft.OFTConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({k: v for k, v in values.items() if k != "oft_block_size"})
    )
    with (
        pytest.warns(UserWarning, match=r"adapter_config\.json"),
        pytest.raises(NotImplementedError, match="an OFT adapter must have oft_block_size"),
    ):
        PeftModel.from_pretrained(make("llama"), tmp_path)


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_butterfly_factors_are_pefts(hf_peft, monkeypatch, tmp_path, factors):
    """PEFT's own CUDA kernel for several factors is replaced by torch's block_diag, which it stands for."""
    from peft.tuners.boft import layer

    block_diagonal = SimpleNamespace(apply=lambda blocks: torch.stack([torch.block_diag(*each) for each in blocks]))
    monkeypatch.setattr(layer, "FastBlockDiag", block_diagonal)
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    options = {"boft_block_size": 4, "boft_n_butterfly_factor": factors, "target_modules": ["q_proj", "down_proj"]}
    theirs = hf_peft.get_peft_model(make("llama"), hf_peft.BOFTConfig(**options)).eval()
    randomize(theirs, std=0.5)
    expected = logits(theirs, batch("llama"))
    (expected**2).mean().backward()
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True).eval()
    y = logits(ours, batch("llama"))
    assert_same_function(y, expected)
    (y**2).mean().backward()
    grads = {name.partition(".")[2]: p.grad for name, p in ours.adapters["default"].named_parameters()}
    own = {n.replace(".default", ""): p.grad for n, p in theirs.base_model.model.named_parameters() if p.requires_grad}
    assert_same_gradients(grads, own)
    with torch.no_grad():
        assert_same_function(logits(ours.merge_and_unload(), batch("llama")), expected)


def test_boft_file_trained_without_peft_kernel_has_one_factor(hf_peft, monkeypatch, tmp_path):
    """The file asks for two and holds one."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    config = hf_peft.BOFTConfig(boft_n_butterfly_factor=2, target_modules=["q_proj"])
    theirs = hf_peft.get_peft_model(make("llama"), config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(make("llama"), tmp_path)
    with torch.no_grad():
        assert_same_function(logits(ours, batch("llama")), logits(theirs, batch("llama")))
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boft_block_size": 5}, "boft_block_size must divide the 32 inputs of model.layers.0.self_attn.q_proj, got 5"),
        ({"boft_n_butterfly_factor": 5}, "must be a multiple of 16 and their size even, got 8 blocks of 4"),
        ({"boft_block_size": 1, "boft_n_butterfly_factor": 2}, "their size even, got 32 blocks of 1"),
    ],
)
def test_error_names_unsuitable_boft_blocks(options, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(make("llama"), peft.BOFTConfig(target_modules=["q_proj"], **options))


@pytest.mark.parametrize(
    "config",
    [
        peft.OFTConfig(
            oft_block_size=8,
            module_dropout=0.5,
            init_weights=False,
            use_cayley_neumann=False,
            target_modules=["q_proj"],
        ),
        peft.BOFTConfig(boft_n_butterfly_factor=2, boft_dropout=0.5, init_weights=False, target_modules=["q_proj"]),
    ],
    ids=lambda config: config.peft_type,
)
def test_dropped_blocks_are_the_identity(config):
    """In training a share of the blocks, other ones in each call; none in use."""
    model = get_peft_model(make("llama", layers=1), config)
    delta = next(iter(model.adapters["default"][0].deltas.values()))
    x = torch.eye(32)
    whole = delta.eval().prepare_input(x)
    assert torch.equal(delta.prepare_input(x), whole)
    found = [delta.train().prepare_input(x) for _ in range(4)]
    assert all((y - whole).abs().max() > 1e-3 for y in found)
    assert any((y - found[0]).abs().max() > 1e-3 for y in found)
    assert_same_function(found[0] @ found[0].T, x, "orthogonal")


@torch.no_grad()
def test_weighted_sums_of_ia3_are_pefts(hf_peft, tmp_path):
    """Of adapters on different layers too; what is no vector is refused."""
    configs = {
        "default": {},
        "other": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    }
    theirs = hf_peft.get_peft_model(make("llama", layers=1), hf_peft.IA3Config()).eval()
    theirs.add_adapter("other", hf_peft.IA3Config(**configs["other"]))
    for number, name in enumerate(configs):
        theirs.set_adapter(name)
        randomize(theirs, seed=number)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(make("llama", layers=1), tmp_path)
    ours.load_adapter(tmp_path / "other", "other")
    theirs.base_model.add_weighted_adapter(list(configs), [0.7, 0.6], "sum")
    theirs.base_model.set_adapter("sum")
    ours.add_weighted_adapter(list(configs), [0.7, 0.6], "sum")
    ours.set_adapter("sum")
    assert_same_function(logits(ours, batch("llama")), logits(theirs, batch("llama")))
    ours.add_adapter("head", peft.IA3Config(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"adapter 'head' must not replace lm_head\.weight"):
        ours.add_weighted_adapter(["default", "head"], [1.0, 1.0], "further")
    ours.add_adapter("turned", peft.IA3Config(target_modules=["down_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"must all scale the input of model\.layers\.0\.mlp\.down_proj, or all"):
        ours.add_weighted_adapter(["default", "turned"], [1.0, 1.0], "further")


@pytest.mark.parametrize("name", ["LoHaConfig", "LoKrConfig", "OFTConfig", "BOFTConfig", "IA3Config"])
def test_convolutions_are_refused(name):
    class Convolution(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 4)

    options = {"feedforward_modules": []} if name == "IA3Config" else {}
    with pytest.raises(TypeError, match=r"target_modules: conv must be a linear layer.*, got Conv2d"):
        get_peft_model(Convolution(), getattr(peft, name)(target_modules=["conv", "linear"], **options))


def test_only_lora_adapters_are_summed():
    model = get_peft_model(make("llama"), peft.LoKrConfig(r=2))
    with pytest.raises(TypeError, match="add_weighted_adapter: adapter 'default' must be a LoRA adapter"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
