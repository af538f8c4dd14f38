"""The import rules of docs/architecture.md, checked in the source, and the absence of side effects of an import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qlora_kernels"

MAY_IMPORT = {
    "": {"_public", "format", "ops", "nn", "optim", "peft", "distributed", "backends", "integrations"},
    "backends": set(),
    "format": {"format"},
    "ops": {"format", "ops"},
    "backends/reference": {"format", "ops"},
    "backends/cpu": {"format", "ops"},
    "backends/triton": {"format", "ops"},
    "backends/cuda": {"format", "ops"},
    "nn": {"nn", "ops", "format"},
    "peft/core": {"nn"},
    "peft/layers": {"peft/core", "nn"},
    "peft/attention": {"peft/core", "peft/layers", "nn"},
    "peft/framework": {"peft/core", "peft/layers", "peft/attention", "nn", "io"},
    "peft/methods": {"peft/core", "peft/layers", "peft/attention", "peft/framework", "nn"},
    "peft/model": {"peft/core", "peft/layers", "peft/attention", "peft/framework", "peft/methods", "nn"},
    "peft": {"peft", "nn", "io"},
    "optim": {"optim", "ops"},
    "distributed": {"distributed", "nn", "peft", "io", "format"},
    "training": {"training", "io", "nn", "ops", "peft"},
    "io": {"io", "ops", "format"},
    "integrations": {"integrations", "io", "nn", "ops", "peft", "format"},
    "cli": {"cli", "distributed", "integrations", "training", "io", "nn", "peft", "ops", "format"},
}
"""Part of the package -> parts that its modules may import, besides the package's own names. "" is the package's
__init__. docs/architecture.md has the same table."""

FOR_ALL = {"", "rounding"}
"""What every part may import: the package's own names, and rounding.py."""

THIRD_PARTY = {
    "triton": {"backends/triton"},
    "transformers": {"integrations", "cli", "io"},
    "bitsandbytes": {"integrations"},
    "peft": {"integrations"},
}
"""Optional package -> parts that may import it."""


def part_of(path: Path) -> str:
    """Return the part of the package: ops, backends/cpu, ...; empty for the package's __init__."""
    parts = path.relative_to(PACKAGE).parts[:-1]
    return "/".join(parts[:2]) if parts[:1] in (("backends",), ("peft",)) else "/".join(parts[:1])


def imported(path: Path) -> list[tuple[str, int]]:
    """Return the absolute dotted names that `path` imports, with line numbers."""
    package = ["qlora_kernels", *path.relative_to(PACKAGE).parts[:-1]]
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names += [(f"{stem}.{alias.name}", node.lineno) for alias in node.names]
    return names


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_rules(path):
    part = part_of(path)
    for name, line in imported(path):
        if name.startswith("qlora_kernels."):
            target = part_of(PACKAGE / Path(*name.split(".")[1:]).with_suffix(".py"))
            own = target == part or target in FOR_ALL
            allowed = own or {target, target.split("/")[0]} & MAY_IMPORT[part]
            assert allowed, f"{path}:{line}: {part} imports {name}"
            if target.startswith("backends/"):
                assert part == target, f"{path}:{line}: only ops/registry.py, by name, imports a backend"
        root = name.split(".")[0]
        if root in THIRD_PARTY and not name.startswith("qlora_kernels"):
            assert part in THIRD_PARTY[root], f"{path}:{line}: {part or 'the package'} imports {root}"


def test_the_documented_table_is_the_enforced_one():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    text = text.partition("## What may import what")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `?([a-z/]+)`? \| ([a-z/, ]+) \|$", text, re.MULTILINE)
    documented = {part: set(allowed.split(", ")) - {"nothing"} for part, allowed in rows if part != "part"}
    enforced = {part: allowed - {part.split("/")[0]} for part, allowed in MAY_IMPORT.items() if part}
    assert documented == enforced


def private_names_of_other_packages(module: str, path: Path) -> list[str]:
    """Dotted names that `module` imports although a part with an underscore belongs to another folder than its own."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for name in imported_names(module, path):
        parts = name.split(".")
        owners = (".".join(parts[:i]) for i, part in enumerate(parts) if part.startswith("_") and part[:2] != "__")
        if parts[0] in ("qlora_kernels", "bench", "python") and any(owner != package for owner in owners):
            found.append(name)
    return found


def test_no_import_of_another_packages_private_names(tmp_path):
    """What another package imports has a public name. Compiled libraries (_C) are no Python modules, and exempt."""
    path = tmp_path / "module.py"
    path.write_text("from ..ops import _kernels\nfrom ..nn._match import f\nfrom ._own import g\n")
    found = private_names_of_other_packages("qlora_kernels.peft.module", path)
    assert sorted(found) == ["qlora_kernels.nn._match.f", "qlora_kernels.ops._kernels"]
    for top in ("qlora_kernels", "bench", "python", "tests"):
        for path in (ROOT / top).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found = private_names_of_other_packages(module, path)
            assert [name for name in found if not name.endswith("._C")] == [], path


def test_no_import_circles_and_no_import_of_tests():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for top in ("qlora_kernels", "bench", "python")
        for path in (ROOT / top).rglob("*.py")
    }
    graph = {module: imported_modules(module, path, set(modules)) for module, path in modules.items()}
    for module, path in modules.items():
        assert not any(name.split(".")[0] == "tests" for name in imported_names(module, path)), f"{path} imports tests"
    assert circles_of(graph) == []


def test_import_circle_is_detected():
    assert circles_of({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


def imported_names(module: str, path: Path) -> set[str]:
    """Return the dotted names that `module` imports, at its head or inside functions."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{stem}.{alias.name}" for alias in node.names}
    return names


def imported_modules(module: str, path: Path, modules: set[str]) -> set[str]:
    """Return those of `modules` that `module` imports or from which it imports a name."""
    found = {name if name in modules else name.rpartition(".")[0] for name in imported_names(module, path)}
    return (found & modules) - {module}


def circles_of(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules each of which reaches all others of its group, sorted."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            for name in graph.get(waiting.pop(), set()) - seen:
                seen.add(name)
                waiting.append(name)
        reached[start] = seen
    groups = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in graph if a in reached[a]}
    return [list(group) for group in sorted(groups)]


def test_launchers_of_triton_kernels_are_annotated():
    """mypy checks annotated functions of this folder; only those under @triton.jit have no types."""
    for path in (PACKAGE / "backends" / "triton").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
                assert node.returns is not None, f"{path}: {node.name}"
                assert not untyped, f"{path}: {node.name}: {untyped}"


def test_no_catch_all_file_names():
    for path in SOURCES:
        assert path.stem not in ("utils", "helpers", "common", "misc"), path


def test_names_of_modules_are_matched_by_one_module():
    """Lists of names and of endings of names have one rule, in nn/match.py."""
    own_rule = re.compile(r'endswith\((f"\.\{|"\." \+)|\(\.\*\\\.\)\?')
    found = [path.name for path in SOURCES if own_rule.search(path.read_text(encoding="utf-8"))]
    assert found == ["match.py"]


def test_top_level():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    expected = {"pyproject.toml", "setup.py", "MANIFEST.in", "Makefile", "README.md", "CONTRIBUTING.md", "LICENSE"}
    expected |= {"SECURITY.md", "CHANGELOG.md", "CITATION.cff", "mkdocs.yml"}
    expected |= {".ci", "qlora_kernels", "csrc", "python", "tests", "bench", "docs"}
    assert {name for name in top if not name.startswith(".")} <= expected


def test_import_has_no_side_effects():
    """Importing loads no optional package, starts no process, opens no socket and does not initialize CUDA."""
    script = """
import sys
events = []
sys.addaudithook(lambda event, args: events.append(event) if event.split(".")[0] in ("subprocess", "socket") else None)
import torch
del events[:]
import qlora_kernels
assert not events, events
heavy = {"triton", "transformers", "peft", "bitsandbytes", "matplotlib", "scipy"} & set(sys.modules)
assert not heavy, heavy
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def text_calls_without_encoding(source: str) -> list[int]:
    """Return the lines of calls that read or write text without a named encoding."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        opens_text = name == "open" and owner != "os" and not any("b" in mode for mode in modes)
        if name in ("read_text", "write_text") or opens_text:
            lines.append(node.lineno)
    return lines


def test_text_files_have_an_encoding():
    """The package reads and writes text as UTF-8; Windows has another default."""
    assert text_calls_without_encoding('p.read_text(); open(p, "w"); open(p, "rb"); os.open(p, 0)') == [1, 1]
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if (lines := text_calls_without_encoding(path.read_text(encoding="utf-8")))
    }
    assert found == {}
