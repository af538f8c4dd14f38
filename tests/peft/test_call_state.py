"""State of one call: rows, disabled adapters, threads, tasks, recomputation in the backward pass."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import qlora_kernels as qk
from qlora_kernels.peft import LoraConfig, PeftModel, get_peft_model
from tests.peft.cases import build
from tests.peft.models import batch, logits, make, randomize
from tests.support.tolerances import assert_same_function, assert_same_gradients, model_error


def two_adapters(kind: str = "llama", **options) -> PeftModel:
    """Return a model with adapters "a" and "b", not identities, with heads of their own if `options` includes them."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
    model = get_peft_model(make(kind), config, "a")
    model.add_adapter("b", config)
    for i, name in enumerate("ab"):
        model.set_adapter(name)
        randomize(model, seed=i)
    return model.eval()


def in_thread(run):
    found = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0]


def trained(model: PeftModel, *names: str) -> None:
    for name in names:
        for parameter in model.adapters[name].parameters():
            parameter.requires_grad_(True)


# Threads and tasks


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "modules_to_save"])
def test_other_threads_and_tasks_are_unaffected(options):
    model, inputs = two_adapters(**options), batch("llama")
    on = logits(model, inputs)
    with model.disable_adapter():
        off = logits(model, inputs)
        assert not torch.equal(on, off)
        assert_same_function(in_thread(lambda: logits(model, inputs)), on)

    async def disabled():
        with model.disable_adapter():
            await asyncio.sleep(0)
            assert_same_function(logits(model, inputs), off)
            await asyncio.sleep(0)

    async def enabled():
        for _ in range(4):
            assert_same_function(logits(model, inputs), on)
            await asyncio.sleep(0)

    async def both():
        await asyncio.gather(disabled(), enabled(), disabled())

    asyncio.run(both())
    assert_same_function(logits(model, inputs), on)


@torch.no_grad()
@pytest.mark.parametrize("case", ["prompt_tuning", "parallel", "unipelt"])
@pytest.mark.parametrize("kind", ["llama", "torch"])
def test_threads_at_once(case, kind):
    """Methods that pass values between hooks of one call keep them separate for each thread."""
    model = build(case, kind, layers=1)
    randomize(model)
    inputs = [batch(kind, rows=rows, length=5 + rows, seed=rows) for rows in (1, 2, 3)]
    expected = [logits(model, each) for each in inputs]
    wrong = []

    def run(i):
        with torch.no_grad():
            for _ in range(5):
                difference = (logits(model, inputs[i]) - expected[i]).abs().max()
                if difference > model_error() * expected[i].abs().max():
                    wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_call_state_is_reset_after_exception():
    model, inputs = two_adapters(), batch("llama")
    expected = logits(model, inputs)
    handle = model.base_model.lm_head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError):
        model(**inputs, adapter_names=["__base__"] * 3)
    with pytest.raises(KeyError), model.disable_adapter():
        model(**inputs)
    handle.remove()
    assert_same_function(logits(model, inputs), expected)
    assert_same_function(model.base_model(**inputs).logits, expected)
    model(**inputs, adapter_names=["__base__"] * 3)
    assert_same_function(model.base_model(**inputs).logits, expected)


def test_compiled_model_uses_call_state():
    torch._dynamo.reset()
    model, inputs = two_adapters(modules_to_save=["lm_head"]), batch("llama")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for name in "ab":
            model.set_adapter(name)
            assert_same_function(logits(compiled, inputs), logits(model, inputs))
        with model.disable_adapter():
            assert_same_function(logits(compiled, inputs), logits(model, inputs))
        assert_same_function(logits(compiled, inputs), logits(model, inputs))
        model.delete_adapter("a")
        model.delete_adapter("b")
        model.add_adapter("c", LoraConfig(target_modules="all-linear", init_lora_weights=False))
        model.add_adapter("d", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        model.set_adapter("c")
        rows = {"adapter_names": ["c", "__base__", "d"]}
        assert_same_function(logits(compiled, inputs, **rows), logits(model, inputs, **rows))
        assert_same_function(logits(compiled, inputs), logits(model, inputs))


# Rows


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a"] * 3, ["a"] * 12])
def test_one_name_for_each_row(names):
    model = two_adapters()
    with pytest.raises(ValueError, match=f"must be one per row of the batch, 6, got {len(names)}"):
        model(**batch("llama", rows=6), adapter_names=names)
    with pytest.raises(ValueError, match="must be one per row of the batch, 6"):
        model.generate(**batch("llama", rows=6), adapter_names=names, max_new_tokens=1)
    plain = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]), "a")
    with pytest.raises(ValueError, match="must be one per row of the batch, 24"):
        plain(torch.randn(24, 8), adapter_names=names)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 2}], ids=str
)
def test_rows_of_beams_and_returned_sequences(kind, options):
    """Each row generates what it generates alone; sampling has one candidate, so that it is greedy too."""
    model = two_adapters(kind)
    inputs = batch(kind, rows=3)
    inputs.pop("decoder_input_ids", None)
    sampled = {"do_sample": True, "top_k": 1} if "num_beams" not in options else {"do_sample": False}
    options = {"max_new_tokens": 3, **sampled, **options}
    names = ["b", "__base__", "a"]
    mixed = model.generate(**inputs, adapter_names=names, **options)
    each = options.get("num_return_sequences", 1)
    for i, name in enumerate(names):
        row = {key: value[i : i + 1] for key, value in inputs.items()}
        alone = model.generate(**row, adapter_names=[name], **options)
        assert torch.equal(mixed[i * each : (i + 1) * each], alone)


def test_rows_with_prefixes_and_beams():
    model = get_peft_model(make("llama"), qk.peft.PrefixTuningConfig(num_virtual_tokens=3), "a").eval()
    inputs, options = batch("llama", rows=2), {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    mixed = model.generate(**inputs, adapter_names=["a", "__base__"], **options)
    alone = model.generate(**{k: v[:1] for k, v in inputs.items()}, **options)
    assert torch.equal(mixed[:1], alone)


def test_deleting_a_prefix_keeps_the_others():
    """Two sites of one decoder share a configuration, and therefore the attention function."""
    model = get_peft_model(make("t5"), qk.peft.PTuningV2Config(num_virtual_tokens=3, sites=["cross"]), "a").eval()
    expected = logits(model, batch("t5"))
    model.add_adapter("b", qk.peft.PTuningV2Config(num_virtual_tokens=3, sites=["decoder"]))
    model.delete_adapter("b")
    assert_same_function(logits(model, batch("t5")), expected)


# Recomputation


def gradients(model: PeftModel, run) -> dict[str, torch.Tensor]:
    model.zero_grad()
    run(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def of_two_adapters(model: PeftModel) -> torch.Tensor:
    """One loss from calls with different adapters, rows, heads and without adapters."""
    inputs = batch("llama", rows=2)
    loss = torch.zeros(())
    for name in "ab":
        model.set_adapter(name)
        trained(model, "a", "b")
        loss = loss + logits(model, inputs).square().mean()
    if not any(method.overrides.paths for method in model.adapters["a"]):
        loss = loss + logits(model, inputs, adapter_names=["a", "__base__"]).square().mean()
    with model.disable_adapter():
        trained(model, "a", "b")
        loss = loss + 0 * logits(model, inputs).mean()
    model.set_adapter("b")
    trained(model, "a", "b")
    return loss


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["norm"]}], ids=["lora", "modules_to_save"])
def test_two_adapters_in_one_checkpointed_loss(reentrant, options):
    model = two_adapters(**options).train()
    expected = gradients(model, of_two_adapters)
    assert any(".a." in name for name in expected)
    assert any(".b." in name for name in expected)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients(model, of_two_adapters)
    assert_same_gradients(checkpointed, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["blocks", "nested", "compiled"])
def test_checkpoints_by_hand(reentrant, where):
    """Checkpoints around the base model's blocks, with changing adapters, nested, and around compiled code."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, config, "a")
    model.add_adapter("b", config)
    trained(model, "a", "b")
    torch._dynamo.reset()
    call = {
        "blocks": lambda block: block,
        "nested": lambda block: lambda x: checkpoint(block, x, use_reentrant=reentrant),
        "compiled": lambda block: torch.compile(block, backend="aot_eager"),
    }[where]
    blocks = [call(block) for block in model.base_model]

    def run(model, checkpointed):
        total = torch.zeros(())
        for names in ("a", "b", ["a", "b"]):
            model.set_adapter(names)
            trained(model, "a", "b")
            x = torch.ones(3, 8, requires_grad=True)
            for block in blocks if checkpointed else model.base_model:
                x = checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)
            total = total + x.square().sum()
        model.set_adapter("b")
        trained(model, "a", "b")
        return total

    expected = gradients(model, lambda model: run(model, False))
    checkpointed = gradients(model, lambda model: run(model, True))
    assert_same_gradients(checkpointed, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_in_another_thread(reentrant):
    """Recomputation in another thread, as autograd does for devices."""
    model = two_adapters().train()
    inputs = batch("llama", rows=2)
    names = ["b", "__base__"]
    model.set_adapter(["a", "b"])
    expected = gradients(model, lambda m: logits(m, inputs, adapter_names=names).square().mean())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.zero_grad()
    loss = logits(model, inputs, adapter_names=names).square().mean()
    in_thread(loss.backward)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(got, expected)
