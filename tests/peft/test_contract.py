"""The contract of all methods, over each registered method, base format and architecture. A new method adds a case."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import load_file

from qlora_kernels.peft import METHODS, PeftConfig, PeftModel, PTuningConfig, get_peft_model
from tests.peft.adapter_pairs import assert_rows_use_their_adapters
from tests.peft.cases import ARCHITECTURES, CASES, build, task_loss
from tests.peft.models import batch, logits, make, randomize
from tests.support.tolerances import assert_same_function, assert_same_gradients, model_error

METHOD = pytest.mark.parametrize("case", CASES)


def on(*kinds):
    """Every case on those of these models that it is tried on."""
    pairs = [(case, kind) for case in CASES for kind in kinds if kind in CASES[case].kinds]
    return pytest.mark.parametrize(("case", "kind"), pairs, ids=["-".join(pair) for pair in pairs])


LIKE_OTHERS = ("vera", "loha", "boft")
"""Cases that run the code of others: LoRA's and OFT's."""
EVERY_MECHANISM = ("prompt_tuning", "prefix_tuning", "houlsby", "lora", "unipelt")


def on_each_kind(first: int, *, both: Sequence[str] = ()):
    """Every case on each of its models, in turn over dense and over NF4 layers, and over both on the models of `both`.

    Every case and every model thus meets both formats. The code of a method for a model depends on the format only in
    its layers. first: 1 begins with NF4, so that two tests together have every case on every model in both formats.
    """
    cells = [
        (name, kind, nf4)
        for i, (name, case) in enumerate(CASES.items())
        for j, kind in enumerate(case.kinds)
        for nf4 in ((False, True) if kind in both else (bool((i + j + first) % 2),))
        if case.quantized or not nf4
    ]
    cells += [(name, kind, False) for name, case in CASES.items() if not case.quantized for kind in case.kinds]
    cells = list(dict.fromkeys(cells))
    ids = [f"{name}-{kind}-{'nf4' if nf4 else 'linear'}" for name, kind, nf4 in cells]
    return pytest.mark.parametrize(("case", "kind", "nf4"), cells, ids=ids)


@pytest.fixture(autouse=True)
def _one_path_through_torchs_encoder():
    """torch's fast path rounds differently from its slow one, which models with adapters use."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def test_every_method_has_a_case():
    configs = [
        c for case in CASES.values() for c in ([case.config] if isinstance(case.config, PeftConfig) else case.config)
    ]
    assert {type(config) for config in configs} == set(METHODS)


@torch.no_grad()
@on_each_kind(0, both=["llama"])
def test_function(case, kind, nf4, tmp_path):
    """The identity at the start if promised; the base when disabled or unloaded; copies and files equal byte for byte.

    Outputs of two models may differ by the order of their sums, which in MKL depends on the tensors' alignment.
    """
    inputs = batch(kind)
    base = logits(make(kind, nf4=nf4).requires_grad_(False), inputs)
    model = build(case, kind, nf4=nf4)
    start = logits(model, inputs)
    identity = CASES[case].identity
    if identity is not None:
        torch.testing.assert_close(start, base, rtol=0, atol=identity + model_error() * base.abs().max().item())
    randomize(model)
    changed = logits(model, inputs)
    assert (changed - start).abs().max() > 10 * model_error() * start.abs().max(), "the adapter has no effect"
    assert changed.shape == base.shape
    with model.disable_adapter():
        assert_same_function(logits(model, inputs), base, "disabled")
    again = copy.deepcopy(model)
    assert_same_bytes(again.state_dict(), model.state_dict())
    assert_same_function(logits(again, inputs), changed, "copied")
    for method in model.injector.adapters["default"]:
        method.loaded = True  # AdaLoRA would report missing steps
    model.save_pretrained(tmp_path / "first", ["default"])
    again = build(case, kind, nf4=nf4) if case == "fusion" else PeftModel(make(kind, nf4=nf4))
    if case == "fusion":
        again.delete_adapter("default")
    again.load_adapter(tmp_path / "first")
    again.set_adapter("default", inference_mode=True)
    assert_same_function(logits(again, inputs), changed, "loaded")
    assert not any(p.requires_grad for p in again.parameters())
    again.load_adapter(tmp_path / "first", "trained", is_trainable=True)
    again.save_pretrained(tmp_path / "second", ["trained"])
    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.safetensors")]
    assert files
    for file in files:
        first, second = load_file(tmp_path / "first" / file), load_file(tmp_path / "second" / "trained" / file)
        # Prompts and prefixes are stored as computed by their encoder, in addition to the encoder.
        for name in [name for name in first if "prompt_embeddings" in name or "flat." in name]:
            assert_same_function(second.pop(name), first.pop(name), name)
        assert_same_bytes(second, first)
    assert_same_function(logits(model.unload(), inputs), base, "unloaded")


def assert_same_bytes(actual, expected):
    """Assert that two dictionaries of tensors are equal bit for bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@on_each_kind(1)
def test_training(case, kind, nf4, capsys):
    """Only the adapter trains, all of it trains, the count is right, and a task is learned."""
    model = build(case, kind, nf4=nf4, task=True).train()
    adapter = {id(p) for p in model.adapters["default"].parameters()}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in adapter}
    training = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in training.values()} == adapter
    model.print_trainable_parameters()
    printed = int(re.search(r"trainable params: ([\d,]+)", capsys.readouterr().out)[1].replace(",", ""))
    assert printed == sum(p.numel() for p in training.values())
    optimizer = torch.optim.AdamW(training.values(), lr=1e-2)
    losses = []
    moved = {name: p.detach().clone() for name, p in training.items()}
    for step in range(1, 9):
        loss = task_loss(model, kind)
        losses.append(loss.item())
        (loss + model.peft_loss()).backward()
        model.step(step)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    unmoved = [name for name, p in training.items() if torch.equal(p, moved[name])]
    assert not unmoved


@on("llama", "gpt2", "t5")
def test_generate_is_forward(case, kind):
    """Greedy generation with a cache: each step's scores equal the forward's, and its token is their argmax."""
    model = build(case, kind)
    randomize(model)
    inputs = batch(kind, rows=2)
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**inputs, **options)
    whole = {"decoder_input_ids": out.sequences[:, :-1]} if kind == "t5" else {"input_ids": out.sequences[:, :-1]}
    if kind != "t5":
        inputs["attention_mask"] = torch.ones_like(whole["input_ids"])
    y = logits(model, {**inputs, **whole})[:, -4:]
    assert_same_function(torch.stack(out.logits, 1), y)
    assert torch.equal(out.sequences[:, -4:], y.argmax(-1))


@on_each_kind(0)
def test_rows_use_their_adapters_or_are_refused(case, kind, nf4):
    """Two adapters of a method, of different sizes if possible, and the base in one batch; or a clear refusal."""
    if case == "fusion":
        pytest.skip("two fusions of the same adapters are one more than this test's builder makes")
    model = build(case, kind, nf4=nf4)
    randomize(model)
    names = ["default", "__base__", "other", "default"]
    inputs = batch(kind, rows=4)
    config = CASES[case].config
    if isinstance(config, PeftConfig) and hasattr(config, "num_virtual_tokens"):
        config = config.replace(num_virtual_tokens=2)
    model.add_adapter("other", config)
    if not CASES[case].rows:
        with pytest.raises(ValueError, match="cannot serve single rows"):
            logits(model, inputs, adapter_names=names)
        return
    model.set_adapter("other")
    randomize(model, seed=5)
    assert_rows_use_their_adapters(model, inputs, names)


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case in CASES for kind in ("llama", "t5") if kind in CASES[case].kinds]
    + [(case, kind) for case in EVERY_MECHANISM for kind in ("bert", "gpt2")],
)
def test_gradient_checkpointing(case, kind):
    grads = []
    for checkpointing in (False, {"use_reentrant": False}, {"use_reentrant": True}):
        model = build(case, kind).train()
        randomize(model)
        if checkpointing:
            model.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
            if checkpointing["use_reentrant"]:
                model.base_model.enable_input_require_grads()
        task_loss(model, kind, rows=2).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for checkpointed in grads[1:]:
        assert_same_gradients(checkpointed, grads[0])


@on_each_kind(1)
def test_autocast(case, kind, nf4):
    model = build(case, kind, nf4=nf4).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task_loss(model, kind, rows=2)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@METHOD
def test_bf16_base(case):
    torch.manual_seed(0)
    if case == "fusion":
        pytest.skip("its adapters are of another case")
    model = get_peft_model(make("llama").bfloat16(), CASES[case].config)
    y = logits(model, batch("llama"))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()


@pytest.mark.parametrize(
    ("kind", "case"),
    [("llama", case) for case in CASES if case not in LIKE_OTHERS]
    + [(kind, case) for kind in ARCHITECTURES if kind != "llama" for case in EVERY_MECHANISM],
)
def test_compiles(case, kind):
    """One graph, except for the LSTM, which torch.compile does not support. One model is compiled and trained."""
    torch._dynamo.reset()  # its guards identify objects by address, and addresses of earlier models are reused
    training = kind == "llama"
    model = build(case, kind, layers=1).train(training)
    randomize(model)
    compiled = torch.compile(model, backend="aot_eager" if training else "eager", fullgraph="lstm" not in case)
    found = []
    for run in (model, compiled):
        with torch.set_grad_enabled(training):
            y = logits(run, batch(kind, rows=2))
        if training:
            y.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((y.detach(), grads))
        model.zero_grad()
    assert_same_function(found[1][0], found[0][0])
    assert_same_gradients(found[1][1], found[0][1])


@pytest.mark.parametrize("case", CASES)
def test_a_trained_model_is_freed(case):
    """Hooks and caches do not keep the model alive."""
    model = build(case, "llama").train()
    task_loss(model, "llama", rows=2).backward()
    weight = weakref.ref(next(model.parameters()))
    del model
    gc.collect()
    assert weight() is None


def test_peft_loss_is_for_training_only():
    for case in ("adalora", "fusion"):
        model = build(case, "llama")
        randomize(model)
        assert model.peft_loss() == 0
        assert model.train().peft_loss() > 0


def test_full_fine_tuning_is_refused_over_nf4():
    with pytest.raises(ValueError, match="FullFT: the model must be dense, got 14 quantized layers"):
        get_peft_model(make("llama", nf4=True), CASES["full_ft"].config)


def test_training_continues_after_load(tmp_path):
    """The encoders of prefix and P-tuning are restored only for training."""
    for case in ("prefix_tuning", "p_tuning", "p_tuning_lstm", "mam", "unipelt"):
        model = build(case, "t5")
        randomize(model)
        model.save_pretrained(tmp_path / case)
        counts = {}
        for trainable in (False, True):
            again = PeftModel.from_pretrained(make("t5"), tmp_path / case, is_trainable=trainable)
            assert_same_function(logits(again.eval(), batch("t5")), logits(model, batch("t5")))
            counts[trainable] = sum(p.numel() for p in again.adapters.parameters())
        assert counts[True] == sum(p.numel() for p in model.adapters.parameters())
        assert counts[False] < counts[True] or isinstance(CASES[case].config, PTuningConfig)
