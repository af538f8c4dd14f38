"""qlora-kernels finetune: trains an adapter on a model in NF4, and measures perplexity before and after."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import shlex
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from .. import LinearNF4, fuse_model
from ..integrations.model_folders import as_model_error, is_quantized, load_model, load_tokenizer, model_outline
from ..io.atomic import file_appearing_by_rename, make_folder
from ..io.json_file import read_json_object
from ..io.locks import held_alone
from ..io.streaming import folder_fingerprint
from ..peft.framework import checkpoint
from ..rounding import cdiv
from ..training import (
    ChunkedLoss,
    Interrupted,
    LostWorkerError,
    TextTokens,
    Workers,
    is_dataset,
    joined,
    keeps_apart,
    perplexity,
)
from ..training.run_state import fingerprint
from .arguments import UsageError, bad_input
from .console import Console, peak_device_bytes, peak_rss_bytes
from .finetune_data import DataStage, check_limits, padding_id, virtual_tokens
from .finetune_options import FinetuneOptions
from .finetune_report import FinetuneReport, can_plot, write_loss_curve
from .finetune_training import TrainingStage, check_no_other_run, has_checkpoints, shard
from .fusion_gain import step_seconds
from .generate import continuation
from .interrupts import Interrupt, deferred
from .limits import max_positions
from .model_source import dense_folder, load_adapter, nf4_folder
from .recipes import write_recipe
from .trackers import check_trackers

_PROMPT_TOKENS = 24
"""Tokens of the unseen text that are used as the prompt without --prompt."""


def run(arguments: argparse.Namespace) -> int:
    """Run the whole command. Returns 1 if training diverged or the reloaded adapter gives another perplexity.

    Raises UsageError for options that contradict each other, and if another run is writing to --out.
    """
    options = FinetuneOptions.of(arguments)
    options.check()
    _check_needs(options)
    check_trackers(options.track)
    check_no_other_run(options)
    _prepare_output(options)
    try:
        device = torch.device(options.device)
        with joined(dict(os.environ), timedelta(seconds=options.timeout), device) as workers:
            console = Console(quiet=options.json or not workers.first)
            with held_alone(options.out) if workers.first else nullcontext(True) as alone:
                if not alone:
                    raise UsageError(f"--out: {options.out} must be this run's alone, another run is writing to it")
                run = _Finetune(options, console, workers, arguments)
                try:
                    report = run.run()
                except Interrupted as stopped:
                    if workers.first:
                        what = f"stopped by {run.interrupt.name} after step {stopped.step} of {stopped.steps}"
                        _say_how_to_resume(options, what)
                    workers.wait()  # a launcher ends the other processes as soon as one has left
                    return run.interrupt.exit_code
    except (KeyboardInterrupt, SystemExit):
        if has_checkpoints(options.out) and os.environ.get("RANK", "0") == "0":
            _say_how_to_resume(options, "stopped")
        raise
    except (FloatingPointError, LostWorkerError) as error:
        sys.stderr.write(f"qlora-kernels finetune: {error}\n")
        return 1
    if not workers.first:
        return 0
    print(report.to_json() if options.json else report.table())
    trained, reloaded = (report.perplexity.get(name) for name in ("NF4 + adapter, trained", "NF4 + adapter, reloaded"))
    # On a GPU the order of sums, and with it the last bits, may differ between two calls.
    same = trained == reloaded or (options.device != "cpu" and math.isclose(trained or 0, reloaded or 0, rel_tol=1e-3))
    if not same:
        sys.stderr.write(f"qlora-kernels finetune: the reloaded adapter gives {reloaded}, not {trained}\n")
        return 1
    return 0


def _say_how_to_resume(options: FinetuneOptions, what: str) -> None:
    if options.trainer == "hf":
        sys.stderr.write(
            f"qlora-kernels finetune: {what}; --trainer hf cannot be resumed, the adapter so far is in {options.out}\n"
        )
        return
    command = shlex.join(["qlora-kernels", "finetune", "--config", str(options.out / "run.yaml"), "--resume"])
    sys.stderr.write(f"qlora-kernels finetune: {what}; continue with: {command}\n")


def _check_needs(options: FinetuneOptions) -> None:
    """Raise ModuleNotFoundError for a missing optional package that the command needs, before any work is done."""
    for name in ("transformers", "accelerate", "tqdm", "psutil"):
        importlib.import_module(name)
    if options.data != "builtin" and is_dataset(options.data):
        importlib.import_module("datasets")


def _prepare_output(options: FinetuneOptions) -> None:
    with bad_input():
        make_folder(options.out)
        with tempfile.TemporaryFile(dir=options.out):
            pass  # it can be written to


class _Finetune:
    """One run: the steps of the command and their shared data."""

    def __init__(
        self, options: FinetuneOptions, console: Console, workers: Workers, arguments: argparse.Namespace
    ) -> None:
        self.options = options
        self.console = console
        self.workers = workers
        self.device = torch.device(options.device)
        self.report = FinetuneReport(options.model, options.data, str(options.out), device=options.device)
        self.interrupt = Interrupt()
        self.arguments = arguments

    def run(self) -> FinetuneReport:
        with bad_input():
            self.adapter_config = self.options.adapter_config()
        if not can_plot():
            self._note("loss.png is not drawn: matplotlib is missing; `pip install 'qlora_kernels[plot]'` brings it")
        nothing_to_resume = self.options.resume and not has_checkpoints(self.options.out)
        if nothing_to_resume and not (self.options.out / "report.json").exists():
            self._note_nothing_to_resume()
        data = DataStage(self.options, self.console, self.report, self._note)
        corpus = data.read()
        dense = dense_folder(self.options.model, self.options.cache_folder, self.console)
        with bad_input():
            self.tokenizer = load_tokenizer(dense)
            train_examples, self.unseen = data.examples(corpus, self.tokenizer)
            outline, everything = model_outline(dense), [*train_examples, *self.unseen]
            check_limits(self.options, self.adapter_config, self.tokenizer, outline, everything, self.device)
            self.pad_token_id = padding_id(self.tokenizer, outline)
        self._set_steps(len(train_examples))
        self.console.say(f"{len(train_examples)} examples to train on, {len(self.unseen)} unseen")
        quantized = self._quantize(dense)
        with bad_input():
            self.report.options = json.loads(json.dumps(self.options.result_options()))
            self.report.base, self.report.examples = folder_fingerprint(quantized), fingerprint(train_examples)
        if self.options.resume and (finished := self._finished()) is not None:
            self.console.say(f"finished already: {self.options.out} is left as it is")
            self.workers.wait()
            return finished
        if nothing_to_resume and (self.options.out / "report.json").exists():
            self._note_nothing_to_resume()
        if not is_quantized(dense):
            self._measure("16-bit base", self._sharded(load_model(dense, self.options.dtype, self._load_device)))
        model = self._sharded(self._load(quantized))
        self._check_packing(model)
        self._measure("NF4 base", model)
        if self.options.sharding is not None:  # adapters have to be added before the model is sharded
            del model
            model = self._load(quantized)
        stage = TrainingStage(
            self.options,
            self.console,
            self.workers,
            self.report,
            self.adapter_config,
            self.pad_token_id,
            self.unseen,
            self.device,
        )
        adapter = self.options.out / "adapter"
        with deferred("training stops after this step, with a checkpoint; a second signal stops it at once") as signals:
            self.interrupt = signals
            if not self.options.resume:
                self._write_recipe()
            adapted = stage.run(model, train_examples, signals)
            stage.save(adapted, adapter)
            self.workers.wait()
            if self.workers.total(float(signals())):  # the signal came during the last step
                raise Interrupted(len(self.report.steps), self.options.steps, None)
        self._measure("NF4 + adapter, trained", adapted)
        if self.options.model == "builtin" and self.workers.first and self.options.sharding is None:
            with self.console.stage("compare --fuse"):
                batch = train_examples[: self.options.micro_batch or self.options.batch]
                self.report.step_seconds = step_seconds(adapted, batch, self.pad_token_id)
        del model, adapted
        reloaded = self._sharded(load_adapter(self._load(quantized), adapter))
        self._measure("NF4 + adapter, reloaded", reloaded)
        if self.workers.first or self.options.sharding is not None:  # all processes of a sharded model generate
            self._sample(reloaded)
        if self.workers.first:
            self._finish()
            stage.remove_checkpoints()
        self.workers.wait()
        return self.report

    @property
    def _load_device(self) -> torch.device | None:
        """Where models are loaded to; a model that is sharded stays in the CPU's memory until then."""
        return self.device if self.options.sharding is None else None

    def _sharded(self, model: nn.Module) -> nn.Module:
        """Shard a model for evaluation, where the run is sharded."""
        if self.options.sharding is not None:
            shard(model, self.options.sharding, self.device)
        return model

    def _write_recipe(self) -> None:
        if self.workers.first:
            with file_appearing_by_rename(self.options.out / "run.yaml") as partial:
                write_recipe(partial, self.arguments, self.arguments.parser)

    def _set_steps(self, examples: int) -> None:
        """Convert --epochs to a number of steps, on which the learning rate and some adapters depend."""
        if self.options.epochs is not None:
            self.options = replace(self.options, steps=self.options.steps_of(examples))
            with bad_input():
                self.adapter_config = self.options.adapter_config()

    def _note_nothing_to_resume(self) -> None:
        self._note(f"nothing to resume: {self.options.out / 'checkpoints'} holds no checkpoint, so it starts anew")

    def _finished(self) -> FinetuneReport | None:
        """Return the report of the run that --resume continues, if the run has ended and its adapter is complete."""
        out = self.options.out
        try:
            report = FinetuneReport.of(read_json_object(out / "report.json"))
            checkpoint.load_adapter(out / "adapter")
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None
        return report if report.result_of() == self.report.result_of() else None

    def _note(self, note: str) -> None:
        self.report.notes.append(note)
        self.console.say(note)

    def _check_packing(self, model: nn.Module) -> None:
        if self.options.packing and not keeps_apart(model):
            raise UsageError(
                f"--packing: {type(model).__name__} must keep packed examples apart by their position ids, and does "
                "not; leave --packing out"
            )

    def _quantize(self, dense: Path) -> Path:
        options = self.options
        return nf4_folder(
            dense,
            options.cache_folder,
            self.console,
            skip=options.skip,
            blocksize=options.blocksize,
            double_quant=options.double_quant,
            compute_dtype=options.dtype,
        )

    def _load(self, folder: Path) -> nn.Module:
        with bad_input(), self.console.stage("load"):
            if self.options.sharding is None:
                model = load_model(folder, self.options.dtype, self._load_device)
            else:
                process = (self.workers.rank, self.workers.world)
                model = self.workers.all_or_none(
                    lambda: load_model(folder, self.options.dtype, mapped=True, process=process)
                )
        layers = [module for module in model.modules() if isinstance(module, LinearNF4)]
        self.report.layers = len(layers)
        self.report.bytes_dense = sum(2 * layer.quant_state.numel for layer in layers)
        self.report.bytes_nf4 = sum(layer.quant_state.nbytes for layer in layers)
        if self.options.fuse:
            self._fuse(model)
        return model

    def _fuse(self, model: nn.Module) -> None:
        fused = fuse_model(model)
        self.report.fused = len(fused.replaced)
        for reason in dict.fromkeys(fused.skipped.values()):
            names = [name for name, other in fused.skipped.items() if other == reason]
            note = f"--fuse leaves {len(names)} modules alone, {names[0]} first: {reason}"
            if note not in self.report.notes:  # the model is loaded again to check its adapter
                self._note(note)
        if not fused.replaced and not fused.skipped:
            raise UsageError(
                f"--fuse: {type(model).__name__} must have parts that fuse_model knows, got none; leave it out"
            )

    def _measure(self, name: str, model: nn.Module) -> None:
        if not self.unseen:
            return
        batch = self.options.micro_batch or self.options.batch
        with (
            self.console.stage("evaluate"),
            self.console.bar(cdiv(len(self.unseen), batch), name, "batch") as bar,
            bad_input(),
            as_model_error(Path(self.options.model), "must be a model that can be run", (LostWorkerError,)),
            self.workers.naming_the_lost(),
        ):
            loss = ChunkedLoss(model)
            measured = perplexity(loss, self.unseen, batch, self.pad_token_id, bar.update, self.workers)
        self.report.perplexity[name] = measured.value
        self.report.predictions = measured.tokens
        self.console.say(f"perplexity, {name}: {measured.value:.3f}")

    def _sample(self, model: nn.Module) -> None:
        options = self.options
        if not options.max_new_tokens:
            return
        prompt = options.prompt
        if prompt is None and self.unseen:
            prompt = self.tokenizer.decode(self.unseen[0].input_ids[:_PROMPT_TOKENS])
        if not prompt:
            return
        most = max_positions(model)
        used = len(TextTokens(self.tokenizer).ids(prompt)) + virtual_tokens(self.adapter_config)
        new_tokens = options.max_new_tokens if most is None else min(options.max_new_tokens, most - used)
        if new_tokens > 0:
            with self.console.stage("generate"):
                text = continuation(model, self.tokenizer, prompt, new_tokens)
            self.report.sample = {"prompt": prompt, "text": text}

    def _finish(self) -> None:
        report, out = self.report, self.options.out
        if self.options.model == "builtin":
            report.notes += [
                "the 16-bit base is itself dequantized from Q4_1, so NF4 is compared with that, not with the original",
                "at this size the 4-bit saving shows in the weights, not in peak memory, which activations and the "
                "16-bit base that was measured first make up",
            ]
        if can_plot():
            write_loss_curve(out / "loss.png", report.steps)
        self._write_recipe()
        report.seconds = {**self.console.stages, "all": self.console.seconds}
        report.peak_rss_bytes = peak_rss_bytes()
        report.peak_device_bytes = peak_device_bytes(self.device)
        with file_appearing_by_rename(out / "report.json") as partial:
            partial.write_text(report.to_json() + "\n", encoding="utf-8")
