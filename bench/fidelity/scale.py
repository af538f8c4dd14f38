"""Claim `scale`: LoRA's scaling alpha / r makes high ranks learn less; rsLoRA's alpha / sqrt(r) does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

import qlora_kernels as qk

from ..markdown import table
from ..row_file import Row
from .claim import Claim, Finding, find

OPTIMIZERS = ("SGD", "AdamW")
RANKS = (4, 16, 64, 256)
STEPS, FEATURES, SAMPLES = 20, 512, 256
LEARNING_RATE = {"SGD": 5e-4, "AdamW": 1e-4}


def cases(quick: bool) -> list[Row]:
    """Return both scalings with both optimizers at every rank."""
    ranks, optimizers = ((4, 16), ("SGD",)) if quick else (RANKS, OPTIMIZERS)
    return [
        {"optimizer": optimizer, "use_rslora": use_rslora, "r": r}
        for optimizer in optimizers
        for use_rslora in (False, True)
        for r in ranks
    ]


def measure(chosen: Sequence[Row], quick: bool) -> Iterator[Row]:
    """Measure how far some steps on a random regression change the outputs, and how far they reduce the loss."""
    for case in chosen:
        yield case | _train(case, features=32 if quick else FEATURES, steps=2 if quick else STEPS)


def _train(case: Row, features: int, steps: int) -> Row:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(features, features, bias=False))
    x = torch.randn(SAMPLES, features)
    target = model(x).detach() + x @ torch.randn(features, features) / features**0.5
    config = qk.peft.LoraConfig(
        r=case["r"], lora_alpha=16, use_rslora=case["use_rslora"], target_modules=["0"], init_lora_weights="gaussian"
    )
    model = qk.peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:  # its variance does not depend on the rank, as the theorem assumes
                nn.init.normal_(parameter, std=features**-0.5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    make = torch.optim.SGD if case["optimizer"] == "SGD" else torch.optim.AdamW
    optimizer = make(trained, lr=LEARNING_RATE[case["optimizer"]])
    first = model(x).detach()
    losses = []
    for _ in range(steps):
        loss = (model(x) - target).square().sum(dim=1).mean() / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    moved = (model(x).detach() - first).square().mean().sqrt().item()
    return {"moved": round(moved, 6), "loss_ratio": round(losses[-1] / losses[0], 5)}


def show(rows: Sequence[Row]) -> str:
    """Return a table of learned shares of the loss, one line per optimizer and scaling, one column per rank."""
    ranks = sorted({row["r"] for row in rows})
    lines = []
    for optimizer in dict.fromkeys(row["optimizer"] for row in rows):
        for use_rslora in (False, True):
            found = [find(rows, optimizer=optimizer, use_rslora=use_rslora, r=r) for r in ranks]
            scaling = "alpha / sqrt(r)" if use_rslora else "alpha / r"
            lines.append([optimizer, scaling, *(f"{1 - row['loss_ratio']:.2%}" if row else "" for row in found)])
    return table(["optimizer", "scaling", *(f"r = {r}" for r in ranks)], lines)


def judge(rows: Sequence[Row]) -> list[Finding]:
    """Compare the learned share of the loss at the highest rank with that at the lowest."""
    findings = []
    for optimizer in dict.fromkeys(row["optimizer"] for row in rows):
        ratios = {}
        for use_rslora in (False, True):
            chosen = [row for row in rows if (row["optimizer"], row["use_rslora"]) == (optimizer, use_rslora)]
            if len(chosen) > 1:
                low, high = min(chosen, key=lambda row: row["r"]), max(chosen, key=lambda row: row["r"])
                ratios[use_rslora] = (1 - high["loss_ratio"]) / (1 - low["loss_ratio"])
                span = f"from r = {low['r']} to {high['r']}"
        if len(ratios) < 2:
            continue
        stable = 0.5 <= ratios[True] <= 2
        findings.append(
            Finding(
                "rsLoRA",
                f"Under {optimizer}, higher ranks learn less at alpha / r and as much at alpha / sqrt(r)",
                stable and ratios[False] < 0.5,
                f"{span} the share that is learned is multiplied by {ratios[False]:.2f} at alpha / r and by "
                f"{ratios[True]:.2f} at alpha / sqrt(r)",
            )
        )
    return findings


CLAIM = Claim(
    name="scale",
    title="rsLoRA's scaling",
    source="rsLoRA (arXiv:2312.03732), theorem 3.2 and section 4",
    method=(
        f"One linear layer of {FEATURES} x {FEATURES} with LoRA (alpha = 16) learns a random linear map from {SAMPLES} "
        f"samples in {STEPS} steps; A's variance does not depend on the rank, as the theorem assumes, and each "
        "optimizer has one learning rate for all ranks. The table shows by how much the steps reduce the loss. AdamW "
        "divides each gradient by its own size, so that the scaling acts once on an update where it acts twice under "
        "SGD. The paper's statement on trained language models is not measured."
    ),
    cases=cases,
    measure=measure,
    table=show,
    judge=judge,
)
