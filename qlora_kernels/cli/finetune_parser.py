"""The options of `qlora-kernels finetune` on the command line. Their defaults are the demo's recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import (
    Subparsers,
    add_command,
    add_model,
    add_quantization,
    dropout,
    fraction,
    names,
    not_negative,
    not_negative_float,
    positive,
    positive_float,
    seed,
)
from .assignment import assignment
from .choices import METHODS, SCHEDULES, TRACKERS, TRAINERS

OPTIMIZERS = ("adamw", "paged_adamw")


def add_parser(subparsers: Subparsers) -> None:
    """Add this subcommand and its options to the command line."""
    parser = add_command(
        subparsers,
        "finetune",
        _run,
        "train an adapter on an NF4 model",
        "Quantize a model to NF4, train an adapter on it, measure perplexity before and after on text that training "
        "never sees, save the adapter in PEFT's layout, and check that it reloads to the same perplexity.",
    )
    add_options(parser)
    parser.set_defaults(parser=parser)


def _run(arguments: argparse.Namespace) -> int:
    from .finetune import run  # imports torch

    return run(arguments)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options but --json to a parser."""
    _add_files(parser)
    add_quantization(parser.add_argument_group("quantization"))
    _add_adapter(parser)
    _add_training(parser)
    _add_evaluation(parser)
    _add_sample(parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("input and output")
    files.add_argument(
        "--config",
        type=Path,
        metavar="FILE.yaml",
        help="options by name; those on the command line override it. Each run writes its own to OUT/run.yaml",
    )
    add_model(files)
    files.add_argument(
        "--data",
        required=True,
        metavar="PATH|OWNER/NAME|builtin",
        help='file with rows of {"text"}, {"prompt", "completion"}, {"messages"}, ShareGPT or Alpaca (.jsonl .json '
        ".csv .tsv .parquet .arrow), or with running text (.txt .md); a folder of rows, or of save_to_disk; a dataset "
        "of the Hugging Face hub, from the local cache; or builtin: the language reference that comes with Python",
    )
    files.add_argument("--split", metavar="NAME", help="split of a dataset (default: train, or the only one)")
    files.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for adapter, report, loss curve")
    files.add_argument("--cache", type=Path, metavar="DIR", help="folder for converted models (default: OUT/cache)")
    files.add_argument(
        "--unseen",
        type=fraction,
        default=0.1,
        metavar="FRACTION",
        help="fraction of a data file that is kept for evaluation",
    )
    files.add_argument(
        "--eval-windows", type=not_negative, default=16, metavar="N", help="unseen examples that are evaluated"
    )


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--method", choices=METHODS, default="lora", help="how the model is adapted")
    adapter.add_argument(
        "--set",
        type=assignment,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of the method's configuration, in JSON; may be given several times",
    )
    adapter.add_argument("--r", type=positive, default=16, metavar="RANK", help="rank of a low-rank update")
    adapter.add_argument("--alpha", type=positive_float, default=32.0, help="the update is scaled by alpha / r")
    adapter.add_argument("--dropout", type=dropout, default=0.0, metavar="P", help="dropout on the adapter's input")
    adapter.add_argument(
        "--target-modules",
        type=_targets,
        default="all-linear",
        metavar="NAME,...",
        help="layers that get a low-rank update, by name or its last parts; all-linear: all but the output head",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, default=40, help="optimizer steps")
    length.add_argument(
        "--epochs", type=positive_float, metavar="PASSES", help="passes over the training examples, instead of --steps"
    )
    training.add_argument("--batch", type=positive, default=4, metavar="EXAMPLES", help="examples a step")
    training.add_argument(
        "--micro-batch", type=not_negative, default=0, metavar="EXAMPLES", help="examples in memory at a time; 0: all"
    )
    training.add_argument(
        "--seq-len", type=positive, default=256, metavar="TOKENS", help="maximum number of tokens of an example"
    )
    training.add_argument(
        "--trainer",
        choices=TRAINERS,
        default="own",
        help="own: the package's loop, which can be resumed; hf: transformers' Trainer on the same batches and loss",
    )
    training.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="join short examples into windows of --seq-len tokens; examples do not attend to each other",
    )
    training.add_argument("--lr", type=positive_float, default=1e-3, help="peak learning rate")
    training.add_argument("--warmup", type=not_negative, default=5, metavar="STEPS", help="steps until the peak")
    training.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="decay of the rate after the warmup")
    training.add_argument(
        "--clip", type=not_negative_float, default=1.0, metavar="NORM", help="largest gradient norm; 0: no clipping"
    )
    training.add_argument(
        "--weight-decay", type=not_negative_float, default=0.01, help="decoupled weight decay of AdamW"
    )
    training.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="adamw", help="paged_adamw: states in paged memory"
    )
    training.add_argument(
        "--seed", type=seed, default=0, help="seed of the adapter's start, the data order and dropout"
    )
    training.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations: less memory, about a third more time",
    )
    training.add_argument(
        "--fuse",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="run norms, rotary embedding and gated MLPs of the model fused, if its code is known",
    )
    training.add_argument(
        "--checkpoint-every",
        type=not_negative,
        default=0,
        metavar="STEPS",
        help="steps between checkpoints; 0: only when the run is stopped",
    )
    training.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in OUT, bit by bit"
    )
    training.add_argument(
        "--overwrite", action="store_true", help="delete the checkpoints of another run in OUT once training starts"
    )
    training.add_argument(
        "--fsdp",
        action=argparse.BooleanOptionalAction,
        help="of several processes (torchrun), let each hold only its part of the model (FSDP2). Default: as an FSDP2 "
        "configuration of accelerate launch says, and whole models without one",
    )
    training.add_argument(
        "--timeout",
        type=positive,
        default=1800,
        metavar="SECONDS",
        help="of several processes (torchrun): how long they wait for a process that does not answer",
    )


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    evaluation = parser.add_argument_group("evaluation during training, and trackers")
    evaluation.add_argument(
        "--eval-every",
        type=not_negative,
        default=0,
        metavar="STEPS",
        help="steps between evaluations on the unseen examples; the adapter of the best one is kept. 0: none, and the "
        "last step's is kept",
    )
    evaluation.add_argument(
        "--patience",
        type=not_negative,
        default=0,
        metavar="N",
        help="stop after N evaluations in a row without a lower perplexity; 0: never",
    )
    evaluation.add_argument(
        "--track",
        type=trackers,
        default=(),
        metavar="NAME,...",
        help=f"send the metrics to trackers: {', '.join(TRACKERS)}",
    )
    evaluation.add_argument("--project", default="qlora_kernels", metavar="NAME", help="project name in the trackers")
    evaluation.add_argument(
        "--run-name", metavar="NAME", help="name of the run in the trackers (default: name of the folder)"
    )


def _add_sample(parser: argparse.ArgumentParser) -> None:
    sample = parser.add_argument_group("sample at the end")
    sample.add_argument("--prompt", help="text to continue (default: the beginning of the unseen text)")
    sample.add_argument(
        "--max-new-tokens", type=not_negative, default=40, metavar="TOKENS", help="tokens of the sample; 0: no sample"
    )


def trackers(text: str) -> tuple[str, ...]:
    """Return names of trackers from a comma-separated list.

    Raises argparse.ArgumentTypeError for an unknown name.
    """
    chosen = names(text)
    for name in chosen:
        if name not in TRACKERS:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(TRACKERS)}, got {name!r}")
    return tuple(dict.fromkeys(chosen))


def _targets(text: str) -> tuple[str, ...] | str:
    return text if text == "all-linear" else names(text)
