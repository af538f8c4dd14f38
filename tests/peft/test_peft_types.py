"""PEFT's adapter types compared with PEFT: outputs, gradients, merges, and files in both directions.

Over NF4, the peer is PEFT over a dense copy of the dequantized model.
"""

from __future__ import annotations

import json
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from qlora_kernels import LinearNF4, peft
from qlora_kernels.nn.module_tree import set_submodule
from qlora_kernels.peft import PeftModel, get_peft_model
from tests.peft.models import batch, logits, make, randomize
from tests.support.tolerances import assert_same_function, assert_same_gradients

PREFIX = "base_model.model."


class Peer(NamedTuple):
    """A configuration that both libraries have, with the name of its class and its fields."""

    name: str
    options: dict[str, Any]
    kind: str = "llama"
    layers: int = 1

    def base(self, *, nf4=False):
        return make(self.kind, nf4=nf4, layers=self.layers)

    def dense_copy(self):
        """Return the NF4 model with nn.Linear layers that hold the dequantized weights."""
        model = self.base(nf4=True)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, LinearNF4):
                set_submodule(model, name, layer.to_linear())
        return model

    def ours(self):
        return getattr(peft, self.name)(**self.options)

    def theirs(self, hf_peft):
        return getattr(hf_peft, self.name)(**self.options)


FEEDFORWARD = {"target_modules": ["q_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
PEERS = {
    "ia3": Peer("IA3Config", {}),
    "ia3_bert": Peer("IA3Config", {"task_type": "SEQ_CLS"}, "bert"),
    "ia3_gpt2": Peer("IA3Config", {}, "gpt2"),
    "ia3_t5": Peer("IA3Config", {"init_ia3_weights": False, "task_type": "SEQ_2_SEQ_LM"}, "t5"),
    "ia3_names": Peer("IA3Config", {**FEEDFORWARD, "exclude_modules": ["q_proj"]}),
    "vera": Peer("VeraConfig", {"r": 4, "target_modules": ["q_proj", "k_proj", "down_proj"], "projection_prng_key": 7}),
    "vera_gpt2": Peer("VeraConfig", {"r": 4, "target_modules": ["c_attn", "c_proj"], "bias": "vera_only"}, "gpt2"),
    "vera_seed": Peer("VeraConfig", {"r": 40, "save_projection": False, "init_weights": False, "d_initial": 0.3}),
    "loha": Peer("LoHaConfig", {"r": 2, "alpha": 5, "target_modules": "all-linear"}),
    "loha_dense": Peer(
        "LoHaConfig", {"r": 6, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3}, "init_weights": False}
    ),
    "lokr": Peer("LoKrConfig", {"r": 2, "alpha": 3, "target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "lokr_both": Peer(
        "LoKrConfig",
        {
            "r": 1,
            "decompose_both": True,
            "decompose_factor": 8,
            "init_weights": "lycoris",
            "target_modules": "all-linear",
            "rank_pattern": {"gate_proj": 3},
            "alpha_pattern": {"up_proj": 2},
        },
    ),
    "lokr_whole": Peer("LoKrConfig", {"r": 16, "init_weights": False, "target_modules": ["v_proj", "up_proj"]}),
    "oft": Peer("OFTConfig", {"oft_block_size": 8, "target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "oft_exact": Peer(
        "OFTConfig",
        {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False, "block_share": True, "target_modules": "all-linear"},
    ),
    "oft_few_terms": Peer(
        "OFTConfig",
        {"oft_block_size": 16, "num_cayley_neumann_terms": 2, "init_weights": False, "bias": "oft_only"},
        "bert",
    ),
    "coft": Peer("OFTConfig", {"oft_block_size": 8, "coft": True, "eps": 0.3, "target_modules": ["v_proj", "up_proj"]}),
    "boft": Peer("BOFTConfig", {"target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "boft_bert": Peer(
        "BOFTConfig",
        {"boft_block_size": 0, "boft_block_num": 4, "init_weights": False, "bias": "boft_only"},
        "bert",
    ),
    "tokens": Peer("TrainableTokensConfig", {"token_indices": [27, 12, 6]}),
    "tokens_t5": Peer("TrainableTokensConfig", {"token_indices": [12, 0, 24], "init_weights": False}, "t5"),
    "tokens_both": Peer(
        "TrainableTokensConfig", {"token_indices": [12, 24], "target_modules": ["embed_tokens", "lm_head"]}
    ),
    "lora_tokens": Peer("LoraConfig", {"r": 2, "trainable_token_indices": [12, 24]}),
    "lora_tokens_by_name": Peer(
        "LoraConfig", {"r": 2, "trainable_token_indices": {"embed_tokens": [12], "lm_head": [3]}}
    ),
    "lora_tokens_t5": Peer("LoraConfig", {"r": 2, "trainable_token_indices": [12]}, "t5"),
}


def their_model(hf_peft, peer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hf_peft.get_peft_model(peer.dense_copy(), peer.theirs(hf_peft)).eval()


def their_load(hf_peft, base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hf_peft.PeftModel.from_pretrained(base, folder).eval()


def their_gradients(model):
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for part in (".default", ".modules_to_save", ".base_layer"):
        grads = {name.replace(part, ""): grad for name, grad in grads.items()}
    return {name.removeprefix(PREFIX): grad for name, grad in grads.items()}


def assert_same_files(ours, theirs):
    """Assert equal keys, shapes and values, and a configuration with PEFT's fields and values."""
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert {name: tensor.shape for name, tensor in first.items()} == {n: t.shape for n, t in second.items()}
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    own, other = (json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, theirs))
    assert own.keys() - {"peft_version"} <= other.keys()
    # A Conv1D in NF4 is a LinearNF4, which is not stored transposed.
    for key in own.keys() - {"peft_version", "base_model_name_or_path", "modules_to_save", "fan_in_fan_out"}:
        values = [sorted(v) if isinstance(v, list) else v for v in (own[key], other[key])]
        assert values[0] == values[1], key


ONE_OF_EACH = [name for name in PEERS if "_" not in name]
OVER_NF4 = [(PEERS[name], True) for name in ONE_OF_EACH]


@pytest.mark.parametrize(
    ("peer", "nf4"),
    [(peer, False) for peer in PEERS.values()] + OVER_NF4,
    ids=[*PEERS, *(f"{name}-nf4" for name in ONE_OF_EACH)],
)
def test_peft_computes_the_same(hf_peft, tmp_path, peer, nf4):
    """An adapter trained by PEFT is loaded and saved here and loaded by PEFT: outputs, gradients, files, merges."""
    inputs = batch(peer.kind)
    theirs = their_model(hf_peft, peer)
    randomize(theirs)
    expected = logits(theirs, inputs)
    (expected**2).mean().backward()
    theirs.save_pretrained(tmp_path / "theirs")
    base = peer.base(nf4=True) if nf4 else peer.dense_copy()
    ours = PeftModel.from_pretrained(base, tmp_path / "theirs", is_trainable=True).eval()
    y = logits(ours, inputs)
    assert_same_function(y, expected)
    (y**2).mean().backward()
    grads = {name.partition(".")[2]: p.grad for name, p in ours.adapters["default"].named_parameters()}
    assert_same_gradients(grads, their_gradients(theirs))
    ours.save_pretrained(tmp_path / "ours")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    again = their_load(hf_peft, peer.dense_copy(), tmp_path / "ours")
    with torch.no_grad():
        assert_same_function(logits(again, inputs), expected, "saved here, loaded by PEFT")
        ours.merge_adapter(safe_merge=True)
        assert_same_function(logits(ours, inputs), expected, "merged")
        ours.unmerge_adapter()
        assert_same_function(logits(ours, inputs), y, "unmerged")
        assert_same_function(logits(ours.merge_and_unload(), inputs), expected, "merged for good")


@pytest.mark.parametrize("peer", [PEERS[name] for name in ONE_OF_EACH], ids=ONE_OF_EACH)
def test_new_adapter_equals_peft(hf_peft, tmp_path, peer):
    """Layers, shapes and start are equal: PEFT loads a file saved here, and its own file has the same names."""
    inputs = batch(peer.kind)
    ours = get_peft_model(peer.base(), peer.ours()).eval()
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf_peft.get_peft_model(peer.base(), peer.theirs(hf_peft)).save_pretrained(tmp_path / "theirs")
    shapes = [
        {name: tensor.shape for name, tensor in load_file(tmp_path / who / "adapter_model.safetensors").items()}
        for who in ("ours", "theirs")
    ]
    assert shapes[0] == shapes[1]
    theirs = their_load(hf_peft, peer.base(), tmp_path / "ours")
    with torch.no_grad():
        assert_same_function(logits(theirs, inputs), logits(ours, inputs))


SEVERAL = pytest.mark.parametrize("name", ["ia3", "lokr", "oft", "boft"])


@SEVERAL
@torch.no_grad()
def test_several_adapters_act_as_in_peft(hf_peft, tmp_path, name):
    """Two at once in either order, each alone, none, and each on its own rows; merges equal forward."""
    peer, inputs = PEERS[name], batch(PEERS[name].kind)
    theirs = their_model(hf_peft, peer)
    theirs.add_adapter("b", peer.theirs(hf_peft))
    for number, adapter in enumerate(("default", "b")):
        theirs.set_adapter(adapter)
        randomize(theirs, seed=number)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(peer.dense_copy(), tmp_path)
    ours.load_adapter(tmp_path / "b", "b")
    outputs = {}
    for names in (["default"], ["b"], ["default", "b"], ["b", "default"]):
        theirs.base_model.set_adapter(names)
        ours.set_adapter(names)
        outputs[tuple(names)] = logits(ours, inputs)
        assert_same_function(outputs[tuple(names)], logits(theirs, inputs), str(names))
        ours.merge_adapter()
        assert_same_function(logits(ours, inputs), outputs[tuple(names)], f"{names} merged")
        with ours.disable_adapter(), theirs.disable_adapter():
            base = logits(ours, inputs)
            assert_same_function(base, logits(peer.dense_copy(), inputs), "disabled")
        ours.unmerge_adapter()
    mixed = logits(ours, inputs, adapter_names=["default", "b", "__base__"])
    rows = [outputs[("default",)], outputs[("b",)], base]
    assert_same_function(mixed, torch.stack([y[i] for i, y in enumerate(rows)]), "rows")


@SEVERAL
@torch.no_grad()
@pytest.mark.parametrize("first", ["lora", "other"])
def test_merges_beside_lora_keep_the_order(name, first):
    """With LoRA before or after it, and where code reads weights, merged layers equal forward."""
    peer, inputs = PEERS[name], batch(PEERS[name].kind)
    lora = peft.LoraConfig(r=2, target_modules="all-linear")
    configs = {"lora": lora, "other": peer.ours()}
    model = PeftModel(peer.base()).eval()
    for number, adapter in enumerate(sorted(configs, key=lambda key: key != first)):
        model.add_adapter(adapter, configs[adapter])
        model.set_adapter(adapter)
        randomize(model, seed=number)
    names = list(model.adapters)
    model.set_adapter(names)
    y = logits(model, inputs)
    model.set_adapter(names[::-1])
    matters = bool((logits(model, inputs) - y).abs().max() > 1e-4)
    assert matters == (name in ("ia3", "oft", "boft")), "only updates that are no sums depend on the order"
    model.set_adapter(names)
    model.merge_adapter(target="same")
    assert_same_function(logits(model, inputs), y)
    model.unmerge_adapter()
    for layer in model.injector.adapted_layers().values():
        layer.weight_is_read = True
        x = torch.randn(3, layer.in_features)
        with torch.no_grad():
            read = torch.nn.functional.linear(x, layer.weight, layer.bias)
            assert_same_function(read, layer(x))


@pytest.mark.parametrize("several", [False, True], ids=["alone", "in a list"])
def test_configurations_of_peft_are_taken(hf_peft, several):
    """Scripts for PEFT keep their configurations: sets, enums and fields that PEFT adds are read as from its files."""
    theirs = hf_peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type=hf_peft.TaskType.CAUSAL_LM
    )
    model = get_peft_model(make("llama"), [theirs] if several else theirs)
    ours = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    assert model.peft_config["default"] == ours
    model.add_adapter("prompt", hf_peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert model.peft_config["prompt"].num_virtual_tokens == 3
    with pytest.raises(
        NotImplementedError,
        match=r"LoraConfig: the configuration must have fields of this method alone, got {.use_qalora.: True}",
    ):
        get_peft_model(make("llama"), hf_peft.LoraConfig(target_modules=["q_proj"], use_qalora=True))
    with pytest.raises(ValueError, match="peft_type must be one of"):
        get_peft_model(make("llama"), hf_peft.VBLoRAConfig())
