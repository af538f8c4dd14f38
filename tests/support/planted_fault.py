"""Faults planted in a word of a Triton kernel's source, and the tests that they are detected."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from triton.runtime.errors import InterpreterError

from qlora_kernels.backends import triton as backend

PACKAGE = "qlora_kernels.backends.triton"


def plant(module: str, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace a module's functions by those of a mutated copy, in all modules of the backend that import them."""
    source = (Path(backend.__file__).parent / f"{module}.py").read_text()
    assert old in source, f"{module}.py no longer contains {old!r}: bring the mutation up to date"
    path = folder / f"{module}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{module}_mutated", path)
    assert spec is not None
    assert spec.loader is not None
    mutated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutated)
    importlib.import_module(f"{PACKAGE}.{module}")
    stock = sys.modules[f"{PACKAGE}.{module}"]
    # A kernel is an object that wraps its function.
    changed = {
        id(value): getattr(mutated, name)
        for name, value in vars(stock).items()
        if getattr(getattr(value, "fn", value), "__module__", None) == stock.__name__
    }
    for name, user in list(sys.modules.items()):
        if name.startswith(f"{PACKAGE}.") and user is not mutated:
            for attribute, value in list(vars(user).items()):
                if id(value) in changed:
                    monkeypatch.setattr(user, attribute, changed[id(value)])


def forget_launches() -> None:
    """Empty the caches of the backend's launchers, which hold launches of the kernels that were there before."""
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{PACKAGE}."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def mutation_tests(
    checks: Mapping[str, Callable[[], None]], mutations: Sequence[tuple[str, str, str, str]]
) -> tuple[Callable[[str], None], Callable[[str, str, str, str, Path, pytest.MonkeyPatch], None]]:
    """Return the two tests of a list of mutations: every check passes as it is, and fails under its mutations.

    checks: name -> a comparison of results.   mutations: (module, old text, new text, name of the check that fails).
    """

    @pytest.mark.parametrize("check", checks)
    def test_checks_pass_unmutated(check: str) -> None:
        checks[check]()

    @pytest.mark.parametrize(("module", "old", "new", "check"), mutations)
    def test_mutation_is_detected(
        module: str, old: str, new: str, check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plant(module, old, new, tmp_path, monkeypatch)
        forget_launches()
        with pytest.raises((AssertionError, InterpreterError)):
            checks[check]()
        forget_launches()

    return test_checks_pass_unmutated, test_mutation_is_detected
