"""Start values of LoRA, and PEFT's files that were trained from them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import qlora_kernels as qk
from qlora_kernels.peft import LoraConfig, PeftModel, get_peft_model, initialize_eva
from tests.peft.models import batch, logits, make, randomize
from tests.support.tolerances import assert_same_function

IDENTITIES = ["gaussian", "orthogonal", "pissa", "pissa_niter_8", "olora", "eva"]


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


X = torch.linspace(-1, 1, 5 * 16).view(5, 16)


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "pissa", "olora", "eva"])
def test_files_trained_by_peft_load(hf_peft, tmp_path, init, rslora):
    """PiSSA and OLoRA subtract their start from the base each time the file is loaded; the others do not."""
    options = {"target_modules": ["0", "2"], "r": 4, "lora_alpha": 12, "use_rslora": rslora}
    theirs = hf_peft.get_peft_model(two_layers(), hf_peft.LoraConfig(init_lora_weights=init, **options)).eval()
    randomize(theirs)
    expected = theirs(X).detach()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(two_layers(), tmp_path / "theirs")
    assert_same_function(ours(X), expected)
    with ours.disable_adapter():
        assert_same_function(ours(X), two_layers()(X))
    ours.save_pretrained(tmp_path / "ours")
    for load in (PeftModel.from_pretrained, hf_peft.PeftModel.from_pretrained):
        assert_same_function(load(two_layers(), tmp_path / "ours").eval()(X), expected)
    assert_same_function(ours.merge_and_unload()(X), expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_conv1d_layers_of_pefts_files(hf_peft, tmp_path, init):
    """PEFT's OLoRA of a Conv1D factors the transposed weight, whose parts do not fit, so no such file exists."""
    options = {"target_modules": ["c_attn"], "r": 4, "fan_in_fan_out": True, "init_lora_weights": init}
    try:
        theirs = hf_peft.get_peft_model(make("gpt2"), hf_peft.LoraConfig(**options)).eval()
        randomize(theirs)
        expected = logits(theirs, batch("gpt2")).detach()
    except RuntimeError:
        assert init == "olora"
        return
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(make("gpt2"), tmp_path)
    assert_same_function(logits(ours, batch("gpt2")), expected)


def test_files_that_need_another_base_are_refused(tmp_path):
    get_peft_model(two_layers(), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for init, error, message in [
        ("loftq", NotImplementedError, "a base that LoftQ quantized, which is not in the file"),
        ("corda", ValueError, "init_lora_weights must be .* got 'corda'"),
    ]:
        path.write_text(json.dumps({**config, "init_lora_weights": init}))
        with (
            pytest.warns(UserWarning, match="differs from the file that was saved"),
            pytest.raises(error, match=message),
        ):
            PeftModel.from_pretrained(two_layers(), tmp_path)
    path.write_text(json.dumps({**config, "init_lora_weights": "pissa_niter_4"}))
    with pytest.warns(UserWarning, match="other random numbers"):
        PeftModel.from_pretrained(two_layers(), tmp_path)


@pytest.mark.parametrize("nf4", [False, True], ids=["linear", "nf4"])
@pytest.mark.parametrize("init", IDENTITIES)
def test_a_new_adapter_is_the_identity(init, nf4):
    base = two_layers()
    if nf4:
        qk.replace_linear(base)
    expected = copy.deepcopy(base)(X)
    model = get_peft_model(base, LoraConfig(target_modules=["0", "2"], r=4, init_lora_weights=init))
    assert_same_function(model(X), expected)
    assert model.base_model[0].deltas["default"].lora_A.weight.abs().sum() > 0


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_start_values_equal_peft(hf_peft, init):
    options = {"target_modules": ["0"], "r": 4, "lora_alpha": 12, "init_lora_weights": init}
    delta = get_peft_model(two_layers(), LoraConfig(**options)).base_model[0].deltas["default"]
    theirs = hf_peft.get_peft_model(two_layers(), hf_peft.LoraConfig(**options)).base_model.model[0]
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    assert_same_function(delta.lora_B.weight @ delta.lora_A.weight, product)


def test_orthogonal_factors():
    delta = get_peft_model(two_layers(), LoraConfig(target_modules=["0"], r=4, init_lora_weights="orthogonal"))
    lora = delta.base_model[0].deltas["default"]
    assert lora.lora_B.weight.abs().sum() > 1
    B, A = lora.lora_B.weight.detach(), lora.lora_A.weight.detach()
    assert_same_function(B @ A, torch.zeros(24, 16), scale=(B.abs() @ A.abs()).max().item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "orthogonal", "r": 3}, "r must be even"),
        ({"init_lora_weights": "olora", "r": 17}, r"olora: r must be <= 16 over a weight of \[24, 16\], got 17"),
        ({"init_lora_weights": "olora", "use_dora": True}, "use_dora must be False"),
        ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights must be"),
        ({"init_lora_weights": "olroa"}, "init_lora_weights must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(two_layers(), LoraConfig(target_modules=["0"], **options))


def test_eva_finds_the_directions_of_the_inputs(tmp_path):
    """Compared with one SVD of all inputs; padding does not count."""
    model = get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights="eva"))
    with pytest.raises(RuntimeError, match="initialize_eva"):
        model.save_pretrained(tmp_path)
    batches = [batch("llama", seed=seed, length=32) for seed in range(3)]
    for inputs in batches:
        inputs["attention_mask"][:, -3:] = 0
    seen: list[torch.Tensor] = []
    place = model.injector.hooked_module("model.layers.0.self_attn.q_proj")
    hook = place.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, :-3].reshape(-1, 32)))
    initialize_eva(model, batches)
    hook.remove()
    lora_A = place.deltas["default"].lora_A.weight.detach()
    assert_same_function(lora_A @ lora_A.T, torch.eye(4))
    rows = torch.cat(seen)
    best = torch.linalg.svd(rows, full_matrices=False).S[:4].square().sum()
    assert (rows @ lora_A.T).square().sum() > 0.95 * best
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"initialize_eva: .* must get inputs of rank 4 or more, got 0"):
        initialize_eva(model, [])
    with pytest.raises(ValueError, match="must be a LoRA of init_lora_weights='eva'"):
        initialize_eva(get_peft_model(make("llama"), LoraConfig()), batches)
