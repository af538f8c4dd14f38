"""qlora-kernels eval: perplexity over a file, and lm-eval's tasks."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..rounding import cdiv
from .arguments import Subparsers, UsageError, add_command, bad_input, names, not_negative, positive
from .console import Console
from .model_options import add_adapter, add_base
from .tables import table

if TYPE_CHECKING:
    from torch import nn

    from .tokenizing import ModelTokenizer


def add_parser(subparsers: Subparsers) -> None:
    """Add this subcommand and its options to the command line."""
    parser = add_command(
        subparsers,
        "eval",
        run,
        "measure perplexity over a file, or run tasks of lm-eval",
        "Measure the perplexity of a model, with or without an adapter, over all rows of a data file, or run tasks of "
        "lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) on it, or both.",
    )
    add_base(parser)
    add_adapter(parser)
    parser.add_argument("--data", metavar="FILE|builtin", help="a file as finetune takes it; all of it is evaluated")
    parser.add_argument(
        "--seq-len", type=positive, default=256, metavar="TOKENS", help="tokens of one example, at most"
    )
    parser.add_argument("--batch", type=positive, default=4, metavar="EXAMPLES", help="examples in memory at one time")
    parser.add_argument("--tasks", type=names, default=(), metavar="TASK,...", help="tasks of lm-eval, by their names")
    parser.add_argument("--task-folder", type=Path, metavar="DIR", help="folder with more of lm-eval's task files")
    parser.add_argument("--few-shot", type=not_negative, metavar="EXAMPLES", help="examples before each question")
    parser.add_argument("--limit", type=positive, metavar="ROWS", help="rows of each task, for a quick look")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate the model and print the results.

    Raises UsageError if neither --data nor --tasks is given, and for --tasks without lm-eval.
    """
    from .model_source import load_adapter, load_base

    if not arguments.data and not arguments.tasks:
        raise UsageError("eval: --data or --tasks must be given, got neither")
    if arguments.tasks and importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--tasks: lm-eval must be installed; run `pip install 'lm-eval[hf]'`")
    console = Console(quiet=arguments.json)
    records = _records(arguments.data) if arguments.data else None
    model, tokenizer = load_base(arguments, console)
    base = model
    if arguments.adapter is not None:
        model = load_adapter(model, arguments.adapter)
    results: dict[str, Any] = {"model": arguments.model, "adapter": arguments.adapter and str(arguments.adapter)}
    if records is not None:
        results |= _perplexity(arguments, *records, model, base, tokenizer, console)
    if arguments.tasks:
        results["tasks"] = _tasks(arguments, model, tokenizer)
    results["seconds"] = console.seconds
    print(json.dumps(results) if arguments.json else _table(results))
    return 0


def _records(data: str) -> tuple[str, tuple[Any, ...]]:
    """Return (name of the data, all its records)."""
    from ..training import language_reference, read_data

    with bad_input():
        if data == "builtin":
            corpus = language_reference()
            return corpus.source, corpus.train + corpus.unseen
        corpus = read_data(data, 0.0)
        return corpus.source, corpus.train


def _perplexity(
    arguments: argparse.Namespace,
    source: str,
    records: tuple[Any, ...],
    model: nn.Module,
    base: nn.Module,
    tokenizer: ModelTokenizer,
    console: Console,
) -> dict[str, Any]:
    from ..integrations.model_folders import as_model_error
    from ..training import ChunkedLoss, encode_rows, perplexity
    from .limits import check_positions, check_token_ids, embedding_rows
    from .tokenizing import within_time

    with bad_input():
        examples, rows = within_time(
            lambda clock: encode_rows(source, clock.timed(records), tokenizer, arguments.seq_len)
        )
        check_token_ids(max(int(example.input_ids.max()) for example in examples), tokenizer, base)
        check_positions(max(len(example.input_ids) for example in examples), base, "--seq-len")
        pad = tokenizer.pad_token_id
        pad = pad if pad is not None and pad < embedding_rows(base) else 0
        batches = cdiv(len(examples), arguments.batch)
        path = Path(arguments.model)
        with as_model_error(path, "must be a model that can be run"), console.bar(batches, "eval", "batch") as bar:
            measured = perplexity(ChunkedLoss(model), examples, arguments.batch, pad, bar.update)
    return {"perplexity": measured.value, "predictions": measured.tokens, "data": source, "rows": str(rows)}


def _tasks(arguments: argparse.Namespace, model: nn.Module, tokenizer: ModelTokenizer) -> dict[str, dict[str, Any]]:
    """Return lm-eval's results by task and metric."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with bad_input():
        evaluated = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch)
        try:
            results = simple_evaluate(
                model=evaluated,
                tasks=list(arguments.tasks),
                num_fewshot=arguments.few_shot,
                limit=arguments.limit,
                task_manager=TaskManager(include_path=arguments.task_folder and str(arguments.task_folder)),
            )
        except KeyError as error:  # from lm-eval's registry
            raise UsageError(f"--tasks: must be names of lm-eval's tasks, got {error}; `lm-eval ls tasks`") from error
    tasks = results["results"]
    return {
        task: {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for task, values in tasks.items()
    }


def _table(results: dict[str, Any]) -> str:
    parts = []
    if "perplexity" in results:
        perplexity = f"{results['perplexity']:.4f} ({results['predictions']:,} predictions)"
        parts.append(table([("data", f"{results['data']}: {results['rows']}"), ("perplexity", perplexity)]))
    tasks = results.get("tasks", {}).items()
    if rows := [(task, name, f"{value:.4f}") for task, values in tasks for name, value in values.items()]:
        parts.append(table(rows, right=(2,)))
    return "\n".join(parts)
