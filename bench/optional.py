"""Packages that the benchmarks compare with where they are installed, and the reason where one is left out."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterable, Iterator
from functools import cache

from .registry import Case, Contender, Suite

NAMES = {
    "bitsandbytes": "bitsandbytes.functional.quantize_4bit",
    "gguf": "gguf.GGUFWriter",
    "llama_cpp": "llama_cpp.Llama",
    "peft": "peft.inject_adapter_in_model",
    "torchao": "torchao.quantization.to_nf4",
    "transformers": "transformers.LlamaForCausalLM",
}
"""Package -> a name in one of its modules that contenders use."""

DISTRIBUTIONS = {"llama_cpp": "llama-cpp-python"}
"""Package -> what pip installs it from, where that has another name."""


@cache
def reason_missing(package: str) -> str | None:
    """Return why the name of a package in NAMES cannot be imported, or None if it can."""
    module, _, name = NAMES[package].rpartition(".")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # some packages print when they are first imported
            getattr(importlib.import_module(module), name)
    except Exception as error:  # a package that does not fit the installed torch fails in many ways
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return f"it is not installed; pip install {DISTRIBUTIONS.get(package, package)}"
        return f"{type(error).__name__}: {error}"
    return None


def runs(contender: Contender, case: Case) -> bool:
    """Whether a contender supports the case and all its packages can be imported."""
    return contender.applies(case) and all(reason_missing(package) is None for package in contender.packages)


def complete(suite: Suite) -> bool:
    """Whether all packages that the inputs of a suite need can be imported."""
    return all(reason_missing(package) is None for package in suite.packages)


def left_out(suites: Iterable[Suite]) -> Iterator[str]:
    """Yield a line for each package that suites or their contenders need and that cannot be imported."""
    needed: dict[str, list[str]] = {}
    for suite in suites:
        for package in suite.packages:
            needed.setdefault(package, []).append(f"suite {suite.op}")
        for contender in suite.contenders:
            for package in contender.packages:
                needed.setdefault(package, []).append(contender.name)
    for package, names in needed.items():
        if (reason := reason_missing(package)) is not None:
            yield f"left out: {', '.join(dict.fromkeys(names))}, because {package} cannot be used: {reason}"
