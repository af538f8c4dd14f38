"""Writes the outputs of the `adapters` library to tests/golden/adapters.safetensors for test_adapters.py.

That library pins transformers 4, so that it cannot be installed with this project's test environment. Run in an
environment with adapters 1.3.0, transformers 4.57.6 and torch, from the root of this repository:

    python -m tests.peft.adapters_peer

Weights are a function of their names, equal on both sides, so that the file holds only outputs.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.peft.models import MODELS, batch

GOLDEN = Path(__file__).parents[1] / "golden/adapters.safetensors"
KINDS = ("bert", "llama", "gpt2", "t5")
PREFIX, HIDDEN, REDUCTION, RANK = 3, 16, 4, 4

# Method -> the models on which it is compared. The library's gates average over the sequence, also in decoders, so only
# BERT. In T5, its prefixes change the relative positions of the model's own tokens by the length of the prefix.
CASES = {
    "base": KINDS,
    "houlsby": KINDS,
    "pfeiffer": KINDS,
    "parallel": KINDS,
    "fusion": KINDS,
    "prefix": ("bert", "llama", "gpt2"),
    "mam": ("bert", "llama", "gpt2"),
    "unipelt": ("bert",),
}


def value(name: str, like: Tensor) -> Tensor:
    """Return a value of the parameter `name`; factors of norms are near one."""
    phase = zlib.crc32(name.encode()) % 10_000
    waves = torch.sin(torch.arange(like.numel(), dtype=torch.float64) * 0.7391 + phase)
    centre = 1.0 if like.dim() == 1 and name.endswith("weight") else 0.0
    return (centre + 0.2 * waves).view(like.shape).to(like.dtype)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(value(name, parameter))


def base(kind: str) -> nn.Module:
    model = MODELS[kind]().eval()
    fill(model)
    return model


def peer_outputs() -> dict[str, Tensor]:
    import adapters
    from adapters.composition import Fuse

    bottleneck = {"reduction_factor": REDUCTION}
    prefix = adapters.PrefixTuningConfig(prefix_length=PREFIX, bottleneck_size=HIDDEN)
    parallel = adapters.ParBnConfig(**bottleneck, scaling=4.0)
    lora = adapters.LoRAConfig(r=RANK, use_gating=True)
    gated = (
        adapters.PrefixTuningConfig(prefix_length=PREFIX, bottleneck_size=HIDDEN, use_gating=True),
        adapters.SeqBnConfig(**bottleneck, use_gating=True),
    )
    configs = {
        "houlsby": adapters.DoubleSeqBnConfig(**bottleneck, non_linearity="gelu"),
        "pfeiffer": adapters.SeqBnConfig(**bottleneck),
        "parallel": parallel,
        "prefix": prefix,
        "mam": adapters.ConfigUnion(prefix, parallel),
        "unipelt": adapters.ConfigUnion(lora, *gated),
    }
    outputs = {}
    for case, kinds in CASES.items():
        for kind in kinds:
            model = base(kind)
            adapters.init(model)
            # In decoders, its sdpa path uses is_causal over prefix and tokens as the mask if no row is padded.
            model.config._attn_implementation = "eager"
            if case == "fusion":
                for name in ("one", "two"):
                    model.add_adapter(name, config=configs["pfeiffer"])
                model.add_adapter_fusion(Fuse("one", "two"))
                model.set_active_adapters(Fuse("one", "two"))
            elif case != "base":
                model.add_adapter(case, config=configs[case])
                model.set_active_adapters(case)
            fill(model.eval())
            with torch.no_grad():
                outputs[f"{case}.{kind}"] = model(**batch(kind)).logits
    return outputs


if __name__ == "__main__":
    from safetensors.torch import save_file

    save_file(peer_outputs(), GOLDEN, metadata={"adapters": "1.3.0", "transformers": "4.57.6"})
