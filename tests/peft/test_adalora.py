"""AdaLoRA compared with its equations and with PEFT, without PEFT's defects. Class 3: training behaviour."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_kernels as qk
from qlora_kernels.peft import AdaLoraConfig, PeftModel, adalora_ranks, get_peft_model
from qlora_kernels.peft.methods.rank_allocator import BudgetSchedule
from tests.peft.adalora_runs import FORMATS, adalora, config, train, trained
from tests.peft.models import batch, logits, make, randomize
from tests.support.tolerances import assert_same_function


@FORMATS
def test_forward_and_gradients(nf4):
    linear = nn.Linear(64, 24)
    base = qk.LinearNF4.from_linear(linear) if nf4 else linear
    w = base.dequantize(torch.float32) if nf4 else linear.weight.detach()
    model = get_peft_model(nn.Sequential(base), config(target_modules=["0"], lora_alpha=6))
    randomize(model)
    triplets = adalora(model).deltas["0"].triplets
    x = torch.randn(2, 5, 64, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    A, E, B = (parameter.detach().clone().requires_grad_() for parameter in triplets)
    x_ref = x.detach().clone().requires_grad_()
    y_ref = x_ref @ (w + 6 / 4 * B @ torch.diag(E.flatten()) @ A).T + linear.bias
    y_ref.square().sum().backward()
    reference = [y_ref, x_ref.grad, A.grad, E.grad, B.grad]
    for ours, expected in zip([y, x.grad, *(p.grad for p in triplets)], reference, strict=True):
        assert_same_function(ours, expected)


def test_importance_and_masks():
    model = get_peft_model(make("llama"), config(deltaT=2))
    randomize(model)
    deltas = adalora(model).deltas
    sensitivity, uncertainty = [{path: [0.0] * 3 for path in deltas} for _ in range(2)]
    for t in range(1, 8):
        logits(model, batch("llama", seed=t)).square().mean().backward()
        before = {path: delta.lora_E.detach().clone() for path, delta in deltas.items()}
        score = {}
        for path, delta in deltas.items():
            parts = []
            for i, w in enumerate(delta.triplets):
                importance = (w * w.grad).abs().detach()
                if t < 7:
                    sensitivity[path][i] = 0.85 * sensitivity[path][i] + 0.15 * importance
                    off = (importance - sensitivity[path][i]).abs()
                    uncertainty[path][i] = 0.85 * uncertainty[path][i] + 0.15 * off
                parts.append(sensitivity[path][i] * uncertainty[path][i])
            score[path] = parts[1].flatten() + parts[0].mean(dim=1) + parts[2].mean(dim=0)
        model.step(t)
        model.zero_grad()
        if t == 1 or (t % 2 and t < 7):
            assert all(torch.equal(before[path], delta.lora_E) for path, delta in deltas.items())
            continue
        budget = int(2 * len(deltas) + 2 * len(deltas) * (1 - (t - 1) / 6) ** 3)
        threshold = torch.cat(list(score.values())).sort(descending=True).values[budget - 1]
        for path, delta in deltas.items():
            kept = (score[path] >= threshold * (1 - 1e-4))[:, None]
            assert torch.equal(delta.lora_E, before[path] * kept), t
    assert sum(adalora_ranks(model).values()) == 2 * len(deltas)


def test_schedule():
    schedule = BudgetSchedule(start=120, end=40, tinit=10, last=90, deltaT=5)
    assert [schedule.budget(t) for t in (0, 10, 50, 90, 200)] == [120, 120, 40 + 10, 40, 40]
    assert [t for t in range(100) if schedule.allocates_at(t)] == [*range(15, 90, 5), *range(90, 100)]
    budgets = [schedule.budget(t) for t in range(100)]
    assert budgets == sorted(budgets, reverse=True)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_regularizer_in_training_only_whatever_the_task(task):
    model = get_peft_model(make("llama"), config(orth_reg_weight=0.3, task_type=task)).train()
    grams = []
    for delta in adalora(model).deltas.values():
        A, _, B = delta.triplets
        grams += [A @ A.T, B.T @ B]
    expected = 0.3 * torch.stack([(gram - torch.eye(4)).square().sum().sqrt() for gram in grams]).mean()
    assert_same_function(model.peft_loss(), expected)
    inputs = {**batch("llama"), "labels": batch("llama")["input_ids"]}
    loss = model(**inputs).loss
    assert model.eval().peft_loss() == 0
    assert_same_function(model(**inputs).loss, loss)


def test_regularizer_of_the_papers_equation(tmp_path):
    """Squared norms, summed; the choice is stored in the sidecar, because PEFT's file has no field for it."""
    model = get_peft_model(make("llama"), config(orth_reg_weight=0.3, orth_reg_squared=True)).train()
    deltas = model.injector.adapters["default"][0].deltas.values()
    grams = [gram for d in deltas for gram in (d.lora_A @ d.lora_A.T, d.lora_B.T @ d.lora_B)]
    expected = 0.3 * sum((gram - torch.eye(len(gram))).square().sum() for gram in grams)
    assert_same_function(model.peft_loss(), expected)
    model.save_pretrained(tmp_path)
    assert "orth_reg_squared" not in (tmp_path / "adapter_config.json").read_text()
    again = PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    assert again.peft_config["default"].orth_reg_squared


def test_step_needs_gradients():
    with pytest.raises(RuntimeError, match="after backward and before zero_grad"):
        get_peft_model(make("llama"), config()).step(0)


def test_equal_initial_and_target_rank():
    model = trained(init_r=3, target_r=3)
    assert set(adalora_ranks(model).values()) == {3}


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.needed, self.idle = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.needed(x) + 0.1 * self.idle(x.roll(1, 0))  # from another row, so that it cannot help


def test_ranks_follow_importance():
    torch.manual_seed(0)
    base, x = TwoBranches(), torch.randn(64, 16)
    target = base(x).detach() + x @ (torch.randn(16, 6) @ torch.randn(6, 16)) / 8
    options = {"target_modules": ["needed", "idle"], "init_r": 6, "target_r": 3, "lora_alpha": 6}
    model = get_peft_model(base, config(**options, total_step=300, tinit=50, tfinal=100, orth_reg_weight=0.01))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    losses = []
    for t in range(300):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        (loss + model.peft_loss()).backward()
        model.step(t)  # before the optimizer's step, which is also allowed
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.05 * losses[0]
    ranks = adalora_ranks(model)
    assert ranks["needed"] >= 5
    assert ranks["needed"] + ranks["idle"] == 6


@FORMATS
def test_final_ranks_shrink_the_forward(nf4):
    model = trained(nf4=nf4, target_r=1)
    ranks, deltas = adalora_ranks(model), adalora(model).deltas
    assert 0 in ranks.values()
    for path, rank in ranks.items():
        lora_A, lora_B, _ = deltas[path].lowrank()
        assert lora_A.shape[0] == lora_B.shape[1] == max(rank, 1)
        assert rank or not lora_A.any()
    if nf4:
        assert set(model.explain().values()) == {"fused"}
    before = logits(model, batch("llama"))
    for path, delta in deltas.items():
        gone = ~delta.kept
        delta.lora_E.data[gone] = 7.0  # simulates an optimizer's momentum
        assert delta.lora_E.shape[0] == 4, path
    assert_same_function(logits(model, batch("llama")), before)


def test_adapters_of_overlapping_names_do_not_share_a_budget():
    model = get_peft_model(make("llama"), config(), adapter_name="a")
    model.add_adapter("ab", config(target_r=1, target_modules=["q_proj"]))
    for name in ("a", "ab"):
        model.set_adapter(name)
        randomize(model, std=0.05)
        train(model, range(10))
    a, ab = adalora_ranks(model, "a"), adalora_ranks(model, "ab")
    assert (sum(a.values()), sum(ab.values())) == (2 * len(a), len(ab))
    assert len(a) > len(ab)
    with pytest.raises(ValueError, match="must be an AdaLoRA adapter"):
        adalora_ranks(model)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_step_does_not_synchronize_and_batches_updates():
    model = get_peft_model(make("llama"), config(total_step=100))
    train(model, range(3))
    model.train()
    logits(model, batch("llama")).square().mean().backward()
    with Operations() as operations:
        adalora(model).allocator.update()
    assert len(operations.names) < 20
    with Operations() as operations:
        model.step(3)
    assert not {"_local_scalar_dense", "nonzero"} & set(operations.names)


@FORMATS
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "t5"])
def test_identity_at_init(kind, nf4):
    base, inputs = make(kind, nf4=nf4), batch(kind)
    before = logits(base, inputs)
    model = get_peft_model(base, config())
    assert_same_function(logits(model, inputs), before)
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
        "lora_E",
    }


@pytest.mark.filterwarnings("error:merge")
@FORMATS
def test_merge_and_unmerge(nf4):
    model, inputs = trained(nf4=nf4), batch("llama")
    before = logits(model, inputs)
    model.merge_adapter(safe_merge=True)
    assert_same_function(logits(model, inputs), before)
    model.unmerge_adapter()
    assert_same_function(logits(model, inputs), before)
    base = model.merge_and_unload()
    assert_same_function(logits(base, inputs), before)


@FORMATS
def test_rows_use_their_adapters(nf4):
    model, inputs = trained(nf4=nf4), batch("llama", rows=2)
    alone = logits(model, inputs)
    with model.disable_adapter():
        base = logits(model, inputs)
    mixed = logits(model, inputs, adapter_names=["default", "__base__"])
    assert_same_function(mixed, torch.stack([alone[0], base[1]]))


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("target_r", {"target_r": 5}),
        ("tinit", {"tinit": 7}),
        ("tfinal", {"tfinal": 9}),
        ("deltaT", {"deltaT": 0}),
        ("beta1", {"beta1": 1.0}),
        ("beta2", {"beta2": 0.0}),
        ("orth_reg_weight", {"orth_reg_weight": -0.1}),
        ("lora_alpha", {"lora_alpha": 0}),
        ("lora_dropout", {"lora_dropout": 1.0}),
        ("bias", {"bias": "some"}),
    ],
)
def test_bad_configurations(field, options):
    with pytest.raises(ValueError, match=f"AdaLoraConfig: {field} must"):
        config(**options)


def test_options_ignored_by_peft_are_refused():
    with pytest.raises(TypeError):
        config(r=4)
    with pytest.raises(NotImplementedError, match="use_rslora"):
        AdaLoraConfig.from_dict({"total_step": 9, "r": 8, "use_rslora": True})
