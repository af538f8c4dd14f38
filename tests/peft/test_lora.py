"""LoRA compared with PEFT and with its equation: outputs, gradients, initializations, variants."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qlora_kernels as qk
from qlora_kernels.peft import LoraConfig, PeftModel, get_peft_model
from qlora_kernels.peft.layers.adapted_linear import AdaptedLinear
from qlora_kernels.peft.methods.lora_layers import row_norms
from tests.peft.models import batch, logits, make, randomize
from tests.support.tolerances import assert_same_function, model_error

# The embedding and a linear layer, of each model.
EMBEDDING = {
    "llama": ["embed_tokens", "v_proj"],
    "bert": ["word_embeddings", "value"],
    "gpt2": ["wte", "c_attn"],
    "t5": ["embed_tokens", "v"],
}


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "t5"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "r": 3, "lora_alpha": 7},
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa"},
        {"lora_bias": True},
        {"target_modules": "EMBEDDING"},
        {"target_modules": "EMBEDDING", "use_dora": True, "init_lora_weights": "gaussian"},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_files_cross_both_ways_with_equal_outputs(hf_peft, clone, tmp_path, kind, options):
    base, inputs = make(kind), batch(kind)
    task = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}.get(kind, "CAUSAL_LM")
    if kind in ("llama", "t5") and "lora_bias" in options:
        pytest.skip("PEFT refuses lora_bias for layers without a bias")
    if "target_modules" in options:
        options = {**options, "target_modules": EMBEDDING[kind]}
    ours = get_peft_model(clone(base), LoraConfig(**{"target_modules": "all-linear", "task_type": task, **options}))
    ours.eval()
    randomize(ours)
    expected = logits(ours, inputs)
    ours.save_pretrained(tmp_path / "ours")
    theirs = hf_peft.PeftModel.from_pretrained(clone(base), tmp_path / "ours").eval()
    assert_same_function(logits(theirs, inputs), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(clone(base), tmp_path / "theirs")
    assert_same_function(logits(again, inputs), expected)


def test_keys_equal_peft(hf_peft, tmp_path):
    from safetensors.torch import load_file

    for module, config, folder in (
        (qk.peft, LoraConfig, tmp_path / "ours"),
        (hf_peft, hf_peft.LoraConfig, tmp_path / "theirs"),
    ):
        options = {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "use_dora": True, "bias": "all"}
        module.get_peft_model(make("bert"), config(**options)).save_pretrained(str(folder))
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    twice = {f"base_model.model.classifier.{wrapper}.bias" for wrapper in ("modules_to_save", "original_module")}
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items() if k not in twice}


@pytest.mark.parametrize("nf4", [False, True], ids=["linear", "nf4"])
def test_equation_and_gradients(nf4):
    torch.manual_seed(3)
    linear = nn.Linear(64, 24)
    base = qk.LinearNF4.from_linear(linear) if nf4 else linear
    w = base.dequantize(torch.float32) if nf4 else linear.weight.detach()
    model = get_peft_model(nn.Sequential(base), LoraConfig(target_modules=["0"], r=4, lora_alpha=6))
    randomize(model)
    delta = model.injector.adapted_layers()["0"].deltas["default"]
    x = torch.randn(2, 5, 64, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    lora_A, lora_B = (f.weight.detach().clone().requires_grad_() for f in (delta.lora_A, delta.lora_B))
    x_ref = x.detach().clone().requires_grad_()
    y_ref = x_ref @ w.T + linear.bias + 6 / 4 * (x_ref @ lora_A.T) @ lora_B.T
    y_ref.square().sum().backward()
    for ours, reference in (
        (y, y_ref),
        (x.grad, x_ref.grad),
        (delta.lora_A.weight.grad, lora_A.grad),
        (delta.lora_B.weight.grad, lora_B.grad),
    ):
        assert_same_function(ours, reference, products=6)


def test_dora_equation():
    linear = nn.Linear(16, 12)
    model = get_peft_model(nn.Sequential(linear), LoraConfig(target_modules=["0"], r=4, use_dora=True))
    x = torch.randn(3, 16)
    assert_same_function(model(x), linear(x), products=3)
    randomize(model)
    delta = model.injector.adapted_layers()["0"].deltas["default"]
    v = linear.weight + delta.scaling * delta.lora_B.weight @ delta.lora_A.weight
    w = delta.lora_magnitude_vector[:, None] * v / v.norm(dim=1, keepdim=True)
    assert_same_function(model(x), x @ w.T + linear.bias, products=3)
    model.merge_adapter()
    assert_same_function(model(x), x @ w.T + linear.bias, products=3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nf4", [False, True], ids=["linear", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_as_one_call_equals_dora_after_the_base_layer(dtype, nf4, bias, monkeypatch):
    linear = nn.Linear(64, 24, bias=bias, dtype=dtype)
    base = qk.LinearNF4.from_linear(linear) if nf4 else linear
    model = get_peft_model(nn.Sequential(base), LoraConfig(target_modules=["0"], r=4, use_dora=True))
    randomize(model)
    delta = model.injector.adapted_layers()["0"].deltas["default"]
    trained = [p for p in model.parameters() if p.requires_grad]
    inputs = torch.randn(5, 64, dtype=dtype), torch.randn(5, 24, dtype=dtype)

    def run():
        x = inputs[0].clone().requires_grad_()
        y = model(x)
        return (y, *torch.autograd.grad(y, [x, *trained], inputs[1]))

    one_call = run()
    monkeypatch.setattr(type(delta), "first_output", lambda *_: None)
    for ours, reference in zip(one_call, run(), strict=True):
        assert ours.dtype == reference.dtype
        assert_same_function(ours, reference, products=6, terms=64, arithmetic=dtype)


def test_row_norms_equal_those_of_the_product():
    weight, lora_A, lora_B = torch.randn(24, 64), torch.randn(4, 64), torch.randn(24, 4)
    weight[3] = 0
    expected = (weight.double() + 1.5 * lora_B.double() @ lora_A.double()).norm(dim=1)
    # Each of the three sums has at most 64 * 4 terms, whose magnitudes add up to at most (|w| + 1.5 |b| |A|)^2.
    magnitude = weight.double().norm(dim=1) + 1.5 * lora_B.double().norm(dim=1) * lora_A.double().norm()
    bound = 64 * 4 * torch.finfo(torch.float32).eps * magnitude**2 / expected
    assert ((row_norms(weight, lora_A, lora_B, 1.5).double() - expected).abs() <= bound).all()
    lora_B.zero_()
    assert torch.equal(row_norms(weight, lora_A, lora_B, 1.5), weight.norm(dim=1))


@pytest.mark.parametrize("nf4", [False, True], ids=["linear", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dora_over_rows_of_zeros(nf4, dtype):
    """The identity at first; finite and still training afterwards. Some mixtures of experts have such rows."""
    linear = nn.Linear(64, 8, bias=False)
    linear.weight.data[2:4] = 0
    base = qk.LinearNF4.from_linear(linear) if nf4 else linear
    x = torch.randn(3, 64)
    before = base(x).detach()
    config = LoraConfig(target_modules=["0"], r=2, use_dora=True)
    model = get_peft_model(nn.Sequential(base), config, adapter_dtype=dtype)
    same = {"products": 3, "terms": 64, "arithmetic": dtype}
    assert_same_function(model(x), before, **same)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        y = model(x)
        y.square().sum().add(y.sum()).backward()
        assert torch.isfinite(y).all()
        assert all(torch.isfinite(p.grad).all() for p in trained)
        optimizer.step()
    assert model(x)[:, 2:4].any()
    expected = model(x).detach()
    assert_same_function(model.merge_and_unload()(x), expected, **same)


@pytest.mark.parametrize("nf4", [False, True], ids=["linear", "nf4"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "gaussian"}])
def test_identity_at_init(nf4, options):
    base, inputs = make("llama", nf4=nf4), batch("llama")
    before = logits(base, inputs)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", **options))
    assert_same_function(logits(model, inputs), before)


@pytest.mark.parametrize("nf4", [False, True], ids=["linear", "nf4"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16"])
def test_pissa_starts_from_principal_part(nf4, init):
    base, inputs = make("llama", nf4=nf4), batch("llama")
    before = logits(base, inputs)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=init))
    assert_same_function(logits(model, inputs), before)
    layer = model.injector.adapted_layers()["model.layers.0.self_attn.q_proj"]
    delta = layer.deltas["default"]
    w = layer.base_layer.weight.float()
    u, s, vh = torch.linalg.svd(w)
    principal = u[:, :4] * s[:4] @ vh[:4]
    trained = delta.scaling * delta.lora_B.weight @ delta.lora_A.weight
    assert (w - trained).norm() < 1.02 * (w - principal).norm()
    with model.disable_adapter():
        assert_same_function(logits(model, inputs), before)


def test_loftq_lowers_the_quantization_error():
    base = make("llama")
    dense = base.model.layers[0].mlp.up_proj.weight.detach().clone()
    plain = qk.LinearNF4.from_linear(nn.Linear(32, 64).requires_grad_(False))
    errors = {}
    for iterations in (1, 4):
        config = LoraConfig(
            target_modules=["up_proj"], r=8, init_lora_weights="loftq", loftq_config={"loftq_iter": iterations}
        )
        layer = get_peft_model(make("llama"), config).injector.adapted_layers()["model.layers.0.mlp.up_proj"]
        delta = layer.deltas["default"]
        assert type(layer.base_layer) is type(plain)
        errors[iterations] = (delta.merged(layer.base_layer.dequantize(), layer.base_layer) - dense).norm()
        errors[0] = (qk.LinearNF4.from_linear(base.model.layers[0].mlp.up_proj).dequantize() - dense).norm()
    assert errors[1] < 0.9 * errors[0]
    assert errors[4] <= errors[1]


def test_loftq_requires_dense_weight():
    with pytest.raises(ValueError, match="must be a dense layer"):
        get_peft_model(make("llama", nf4=True), LoraConfig(init_lora_weights="loftq"))


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_adapter_reloads(tmp_path, iterations):
    inputs = batch("llama")
    config = LoraConfig(target_modules="all-linear", init_lora_weights="loftq", loftq_config={"loftq_iter": iterations})
    model = get_peft_model(make("llama"), config).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("llama", nf4=True), tmp_path).eval()
    assert_same_function(logits(again, inputs), logits(model, inputs))


@pytest.mark.parametrize("nf4", [False, True], ids=["linear", "nf4"])
def test_dropout_only_in_training(nf4):
    model = get_peft_model(make("llama", nf4=nf4), LoraConfig(target_modules="all-linear", lora_dropout=0.5))
    randomize(model)
    inputs = batch("llama")
    model.eval()
    first = logits(model, inputs)
    assert_same_function(logits(model, inputs), first)
    model.train()
    assert (logits(model, inputs) - logits(model, inputs)).abs().max() > 10 * model_error() * first.abs().max()


def test_masters_are_fp32_over_a_bf16_base(hf_peft, tmp_path):
    base, inputs = make("llama").bfloat16(), batch("llama")
    model = get_peft_model(base, LoraConfig(target_modules="all-linear")).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    randomize(model)
    model.save_pretrained(tmp_path)
    theirs = hf_peft.PeftModel.from_pretrained(make("llama").bfloat16(), tmp_path).eval()
    assert_same_function(logits(theirs, inputs), logits(model, inputs))
    half = get_peft_model(make("llama").bfloat16(), LoraConfig(), adapter_dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.bfloat16}


def test_bad_configurations():
    for field, options in (
        ("r must", {"r": 0}),
        ("lora_dropout", {"lora_dropout": 1.0}),
        ("bias", {"bias": "some"}),
        ("init_lora_weights", {"init_lora_weights": "zeros"}),
        ("use_dora", {"use_dora": True, "init_lora_weights": "pissa"}),
        ("lora_bias", {"lora_bias": True, "init_lora_weights": "pissa"}),
    ):
        with pytest.raises(ValueError, match=field):
            LoraConfig(**options)
    with pytest.raises(NotImplementedError, match="use_qalora"):
        LoraConfig.from_dict({"r": 4, "use_qalora": True})


def test_embedding():
    """The rows of the table change by scaling * B A; merged, mixed by row, and counted as in PEFT."""
    table = nn.Embedding(10, 6, padding_idx=0)
    model = get_peft_model(nn.Sequential(table), LoraConfig(target_modules=["0"], r=4, lora_alpha=6))
    ids = torch.tensor([[1, 2, 0], [3, 3, 9]])
    assert torch.equal(model(ids), table(ids))
    assert model.get_nb_trainable_parameters() == (4 * (10 + 6), 4 * (10 + 6) + 60)
    randomize(model)
    delta = model.injector.adapted_layers()["0"].deltas["default"]
    w = table.weight + 6 / 4 * (delta.lora_embedding_B @ delta.lora_embedding_A).T
    assert_same_function(model(ids), w[ids], products=1)
    mixed = model(ids, adapter_names=["__base__", "default"])
    assert_same_function(mixed, torch.stack([table(ids)[0], w[ids][1]]), products=1)
    merged = model.merge_and_unload()[0]
    assert (type(merged), merged.padding_idx) == (nn.Embedding, 0)
    assert_same_function(merged(ids), w[ids], products=1)


def test_embedding_of_another_base_is_refused(hf_peft, tmp_path):
    """PEFT stores the table that it adapted with the adapter."""
    hf_peft.get_peft_model(make("llama"), hf_peft.LoraConfig(target_modules=["embed_tokens"])).save_pretrained(tmp_path)
    PeftModel.from_pretrained(make("llama"), tmp_path)
    with pytest.raises(ValueError, match=r"embed_tokens\.base_layer\.weight must be the base model's own"):
        PeftModel.from_pretrained(make("llama", seed=1), tmp_path)


def test_embedding_refuses_unsupported_options():
    for options in ({"init_lora_weights": "pissa"}, {"lora_bias": True}):
        with pytest.raises(NotImplementedError, match="an embedding must have lora_bias=False and init_lora_weights"):
            get_peft_model(make("llama"), LoraConfig(target_modules=["embed_tokens"], **options))


@pytest.mark.parametrize("nf4", [False, True], ids=["linear", "nf4"])
@pytest.mark.parametrize("bias", [False, True])
def test_lora_bias(nf4, bias):
    linear = nn.Linear(64, 24, bias=bias)
    base = qk.LinearNF4.from_linear(linear) if nf4 else linear
    model = get_peft_model(nn.Sequential(base), LoraConfig(target_modules=["0"], r=4, lora_alpha=6, lora_bias=True))
    randomize(model)
    x = torch.randn(3, 64)
    with model.disable_adapter():
        without = model(x)
    delta = model.injector.adapted_layers()["0"].deltas["default"]
    expected = without + 6 / 4 * delta.lora_B(delta.lora_A(x))
    assert_same_function(model(x), expected, products=3)
    mixed = model(x, adapter_names=["__base__", "default", "__base__"])
    assert_same_function(mixed, torch.stack([without[0], expected[1], without[2]]), products=3)
    merged = model.merge_and_unload()
    assert_same_function(merged(x), expected, products=3)


def test_wrapper_is_transparent():
    linear = nn.Linear(8, 4)
    model = get_peft_model(nn.Sequential(linear), LoraConfig(target_modules=["0"]))
    layer = model.base_model[0]
    assert isinstance(layer, AdaptedLinear)
    assert layer.weight is linear.weight
    assert (layer.in_features, layer.out_features) == (8, 4)
    assert model.unload()[0] is linear


def scaled_embedding(kind):
    """Models whose embedding multiplies its rows by sqrt(d)."""
    import transformers

    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, **heads}
    if kind == "gemma":
        return transformers.GemmaForCausalLM(transformers.GemmaConfig(**sizes)).eval()
    if kind == "gemma3":
        return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes)).eval()
    ends = {f"{end}_{what}": n for end in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))}
    config = transformers.BartConfig(
        vocab_size=48, d_model=16, scale_embedding=True, max_position_embeddings=32, **ends
    )
    return transformers.BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("kind", ["gemma", "gemma3", "bart"])
def test_embedding_with_a_scale(hf_peft, tmp_path, kind):
    names = ["encoder.embed_tokens", "decoder.embed_tokens"] if kind == "bart" else ["embed_tokens"]
    options = {"target_modules": names, "r": 2}
    model = get_peft_model(scaled_embedding(kind), LoraConfig(**options)).eval()
    inputs = {"input_ids": torch.arange(2, 14).view(2, 6)}
    base = logits(model, inputs)
    assert_same_function(base, logits(scaled_embedding(kind), inputs))
    randomize(model)
    expected = logits(model, inputs)
    assert (expected - base).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "ours")
    theirs = hf_peft.PeftModel.from_pretrained(scaled_embedding(kind), tmp_path / "ours").eval()
    assert_same_function(logits(theirs, inputs), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_function(
        logits(PeftModel.from_pretrained(scaled_embedding(kind), tmp_path / "theirs"), inputs), expected
    )
    with torch.no_grad():
        rows = model(**inputs, adapter_names=["default", "__base__"]).logits
    assert_same_function(rows, torch.cat([expected[:1], base[1:]]))
    merged = model.merge_and_unload()
    assert_same_function(logits(merged, inputs), expected)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged").eval()
    assert_same_function(logits(again, inputs), expected)
