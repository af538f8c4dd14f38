"""Houlsby, Pfeiffer, parallel, AdapterFusion, prefixes, MAM and UniPELT compared with the `adapters` library.

Equal weights give equal outputs. adapters_peer.py describes how the library's outputs were made.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from qlora_kernels import peft
from qlora_kernels.peft import PeftModel, get_peft_model
from tests.peft.adapters_peer import CASES, GOLDEN, HIDDEN, PREFIX, RANK, REDUCTION, base, value
from tests.peft.models import batch, logits
from tests.support.tolerances import assert_same_function

# Names of a layer's bottlenecks in the library (after the attention, after the FFN), and of its attentions.
PLACES = {
    "bert": ("{}.attention.output", "{}.output"),
    "llama": ("{}.attention_adapters", "{}.output_adapters"),
    "gpt2": ("{}.attention_adapters", "{}.output_adapters"),
    "t5": ("{}.layer.0", "{}.layer.{}"),
}
POOL = {
    "bert": "bert.encoder.layer.0.attention.self",
    "llama": "model.layers.0.self_attn",
    "gpt2": "transformer.h.0.attn",
}


def take(parameters: dict[str, torch.Tensor], places: dict[str, str]) -> None:
    """Set each of our parameters to the value of the library's name for it."""
    with torch.no_grad():
        for ours, theirs in places.items():
            parameters[ours].copy_(value(theirs, parameters[ours]))


def bottleneck(module, place: str, case: str) -> None:
    names = {"down.weight": "adapter_down.0.weight", "down.bias": "adapter_down.0.bias"}
    names |= {"up.weight": "adapter_up.weight", "up.bias": "adapter_up.bias"}
    take(dict(module.named_parameters()), {o: f"{place}.adapters.{case}.{t}" for o, t in names.items()})


def gate(module, place: str) -> None:
    take(dict(module.named_parameters()), {f"linear.{leaf}": f"{place}.{leaf}" for leaf in ("weight", "bias")})


def adapters(method, kind: str, case: str) -> None:
    for layer in method.injector.layout.layers:
        attention, ffn = (place.format(layer.path, layer.stream[-1]) for place in PLACES[kind])
        module = method.tree[f"{layer.path}.ffn_adapter"]
        bottleneck(module.bottleneck if case == "unipelt" else module, ffn, case)
        if f"{layer.path}.attention_adapter" in method.tree.places:
            bottleneck(method.tree[f"{layer.path}.attention_adapter"], attention, case)
        if case == "unipelt":
            gate(module.gate, f"{ffn}.adapters.{case}.gate")


def prefix(method, kind: str, case: str) -> None:
    """The library's MLP is as wide as the model, ours as the keys, so that the prefixes themselves are compared."""
    pool = f"{POOL[kind]}.prefix_tuning.pool.prefix_tunings.{case}.self_prefix"
    (encoder,) = method.prefixes.values()
    width = encoder.flat().shape[1]
    shapes = {"wte.weight": (PREFIX, 32), "control_trans.0.weight": (HIDDEN, 32), "control_trans.0.bias": (HIDDEN,)}
    shapes |= {"control_trans.2.weight": (width, HIDDEN), "control_trans.2.bias": (width,)}
    table, down, down_bias, up, up_bias = (value(f"{pool}.{n}", torch.empty(s)) for n, s in shapes.items())
    encoder.set_flat(F.linear(torch.tanh(F.linear(table, down, down_bias)), up, up_bias))


def unipelt(method, kind: str, case: str) -> None:
    lora, prefixes, adapter = method.parts
    prefix(prefixes, kind, case)
    adapters(adapter, kind, case)
    for layer in method.injector.layout.layers:
        gate(
            prefixes.tree[f"{layer.path}.prefix_gate"],
            f"{layer.self_attention}.prefix_tuning.prefix_gates.{case}",
        )
    for path, delta in lora.deltas.items():
        place = f"{path}.loras.{case}"
        gate(delta.gate, f"{place}.gate")
        names = {f"lora_{factor}.weight": f"{place}.lora_{factor}" for factor in "AB"}
        take(dict(delta.named_parameters()), names)


def with_method(case: str, kind: str) -> PeftModel | torch.nn.Module:
    options = {"reduction_factor": REDUCTION, "train_layer_norm": False}
    prefixes = {"position_offset": False}
    configs = {
        "houlsby": peft.AdapterConfig(**options),
        "pfeiffer": peft.AdapterConfig(placement="pfeiffer", **options),
        "parallel": peft.AdapterConfig(placement="parallel", scale=4.0, **options),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=PREFIX, **prefixes),
        "mam": peft.MAMConfig(prefix_length=PREFIX, bottleneck_size=32 // REDUCTION, **prefixes),
        "unipelt": peft.UniPELTConfig(prefix_length=PREFIX, lora_r=RANK, reduction_factor=REDUCTION),
    }
    model = base(kind)
    if case == "base":
        return model
    if case == "fusion":
        model = PeftModel(model)
        for name in ("one", "two"):
            model.add_adapter(name, configs["pfeiffer"])
            adapters(model.injector.adapters[name][0], kind, name)
        model.add_adapter("fusion", peft.AdapterFusionConfig(adapters=("one", "two")))
        model.set_adapter("fusion")
        method = model.injector.adapters["fusion"][0]
        for layer in method.injector.layout.layers:
            place = PLACES[kind][1].format(layer.path, layer.stream[-1])
            module = dict(method.tree[f"{layer.path}.fusion"].named_parameters())
            take(module, {name: f"{place}.adapter_fusion_layer.one,two.{name}" for name in module})
        return model
    model = get_peft_model(model, configs[case])
    method = model.injector.adapters["default"][0]
    if case == "mam":
        prefix(method.parts[0], kind, case)
        adapters(method.parts[1], kind, case)
    else:
        {"prefix": prefix, "unipelt": unipelt}.get(case, adapters)(method, kind, case)
    return model


@pytest.mark.parametrize(("case", "kind"), [(case, kind) for case, kinds in CASES.items() for kind in kinds])
def test_same_weights_same_outputs(case, kind):
    expected = load_file(GOLDEN)[f"{case}.{kind}"]
    with torch.no_grad():
        found = logits(with_method(case, kind).eval(), batch(kind))
    assert_same_function(found, expected)
