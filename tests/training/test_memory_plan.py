"""The memory formula against exact counts of tensors' bytes: models, optimizers, saved tensors, the peak of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import qlora_kernels as qk
from qlora_kernels.training import ChunkedLoss
from qlora_kernels.training.batches import Batch
from qlora_kernels.training.memory_plan import CONTEXT_BYTES, DecoderSizes, MemoryPlan, PlanError, RunSettings

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "vocab_size": 512,
}
RUN = RunSettings(r=8, seq_len=16, micro_batch=2)


def decoder(family: str, **changes: object) -> torch.nn.Module:
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**SIZES, "tie_word_embeddings": False, **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def linears(model: torch.nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]


def planned(family: str, settings: RunSettings, **changes: object) -> MemoryPlan:
    with torch.device("meta"):
        outline = decoder(family, **changes)
    return DecoderSizes.of(outline, linears(outline), linears(outline)).plan(settings)


def adapted(family: str, settings: RunSettings, dtype: torch.dtype = torch.bfloat16, **changes: object):
    model = decoder(family, **changes)
    for parameter in model.parameters():  # buffers stay in fp32, as transformers loads them
        parameter.data = parameter.data.to(dtype)
    qk.replace_linear(model, blocksize=settings.blocksize, double_quant=settings.double_quant)
    checkpointing = "non_reentrant" if settings.checkpointing else False
    model = qk.prepare_for_training(model, upcast="none", gradient_checkpointing=checkpointing)
    model = qk.peft.get_peft_model(model, qk.peft.LoraConfig(r=settings.r, target_modules="all-linear"))
    return model.train()


def storage_bytes(tensors) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def batch(settings: RunSettings) -> Batch:
    ids = torch.randint(SIZES["vocab_size"], (settings.micro_batch, settings.seq_len))
    return Batch(ids, ids, None)


def saved_bytes(model: torch.nn.Module, settings: RunSettings) -> int:
    """Bytes of all storages that autograd keeps for the backward pass, those of the model left out."""
    loss = ChunkedLoss(model)
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss(batch(settings))
    return storage_bytes([t for t in kept if t.untyped_storage()._cdata not in own])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators made and that still live; `peak` is the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(n for _, n in self.live.values()))
        return out


@pytest.mark.parametrize(
    ("family", "settings", "changes"),
    [
        ("Llama", RUN, {}),
        ("Llama", replace(RUN, blocksize=128, double_quant=False), {"tie_word_embeddings": True}),
        ("Qwen3", replace(RUN, r=3), {}),
    ],
)
def test_weights_adapters_gradients_and_optimizer_are_exact(family, settings, changes):
    plan = planned(family, settings, **changes)
    model = adapted(family, settings, **changes)
    trained = [p for p in model.parameters() if p.requires_grad]
    layers = [m for m in model.modules() if isinstance(m, qk.LinearNF4)]
    assert plan.nf4 == sum(layer.quant_state.nbytes for layer in layers)
    held = {id(t) for layer in layers for t in [*layer.parameters(), *layer.buffers()]} | {id(p) for p in trained}
    rest = [t for t in [*model.parameters(), *model.buffers()] if id(t) not in held]
    assert plan.dense == storage_bytes(rest)
    assert plan.adapters == storage_bytes(trained)
    optimizer = torch.optim.AdamW(trained)
    ChunkedLoss(model)(batch(settings)).backward()
    assert plan.gradients == storage_bytes([p.grad for p in trained])
    optimizer.step()
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert plan.optimizer == storage_bytes(moments)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_activations_are_exact(family):
    assert planned(family, RUN).activations == saved_bytes(adapted(family, RUN), RUN)


def test_activations_follow_the_settings():
    settings = replace(RUN, seq_len=7, micro_batch=3, r=4)
    assert planned("Llama", settings).activations == saved_bytes(adapted("Llama", settings), settings)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_step(checkpointing):
    """Gradients exist already, as in every micro-batch but the first; the rest is activations and workspace."""
    settings = replace(RUN, checkpointing=checkpointing, seq_len=32, micro_batch=4)
    model = adapted("Llama", settings)
    loss, examples = ChunkedLoss(model), batch(settings)
    loss(examples).backward()
    with LiveBytes() as counter:
        loss(examples).backward()
    plan = planned("Llama", settings)
    counted = plan.activations + plan.workspace
    assert counter.peak <= counted
    assert counter.peak >= (counted / 2 if checkpointing else plan.activations)


def test_checkpointing_keeps_a_hidden_state_for_each_layer_and_one_layer_whole():
    settings = replace(RUN, checkpointing=True)
    plan = planned("Llama", settings)
    saved = saved_bytes(adapted("Llama", settings), settings)
    last_layer = planned("Llama", RUN).activations / SIZES["num_hidden_layers"]
    assert saved < plan.activations < saved + last_layer
    assert planned("Llama", replace(settings, paged=True)).total == plan.total - plan.optimizer


def test_a_card_must_hold_the_context_too():
    plan = planned("Llama", RUN)
    assert plan.total == plan.weights + plan.adapters + plan.gradients + plan.optimizer + (
        plan.activations + plan.workspace
    )
    assert plan.fits(plan.total + CONTEXT_BYTES)
    assert not plan.fits(plan.total + CONTEXT_BYTES - 1)


def test_models_beyond_the_formula_are_refused():
    with pytest.raises(PlanError, match="must be a dense decoder, got a mixture of experts"):
        planned("Mixtral", RUN, num_local_experts=4)
