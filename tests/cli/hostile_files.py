"""Damaged and hostile model and adapter folders for the command line: python -m tests.cli.hostile_files [RUNS] [SEED].

Each run changes one file of an intact folder (cut short, bytes changed, a JSON value replaced) and gives the folder to
a command in this process. The command must end with exit code 0, 1 or 2 and at most one line on stderr; an exception is
a failure.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qlora_kernels.cli import main
from qlora_kernels.integrations.transformers import load_model, quantize_model
from qlora_kernels.peft import LoraConfig, PTuningConfig, get_peft_model
from tests.support.tiny_model import write_tiny_llama

VALUES: list[Any] = [None, True, -1, 0, 1, 2**31, 2**40, 2**70, 1e308, float("nan"), float("inf"), "", "x", "a" * 5000]
VALUES += [[], [1], {}, {"a": 1}, [[[]]], "../../etc/passwd", "__import__('os')"]


def folders(root: Path) -> dict[str, Path]:
    """Return a tiny dense model, an NF4 model and two adapters, all intact."""
    made = {name: root / name for name in ("dense", "nf4", "lora", "p_tuning")}
    write_tiny_llama(made["dense"])
    made["nf4"].mkdir()
    quantize_model(made["dense"], made["nf4"])
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(load_model(made["dense"]), lora).save_pretrained(made["lora"])
    prompt = PTuningConfig(num_virtual_tokens=2, encoder_hidden_size=4, task_type="CAUSAL_LM")
    get_peft_model(load_model(made["dense"]), prompt).save_pretrained(made["p_tuning"])
    return made


def command(kind: str, whole: dict[str, Path], changed: Path, out: Path) -> list[str]:
    """Return the commands to run on the changed copy of folder `kind`."""
    if kind == "dense":
        return ["quantize", str(changed), str(out), "--json"]
    prompt = ["--prompt", "abc", "--max-new-tokens", "1", "--json"]
    if kind == "nf4":
        return ["generate", "--model", str(changed), *prompt]
    return ["generate", "--model", str(whole["nf4"]), "--adapter", str(changed), *prompt]


def changes(path: Path, generator: random.Random) -> tuple[str, bytes]:
    """Return (a description of the change, the file's new contents)."""
    content = path.read_bytes()
    how = generator.choice(
        ["cut", "flip", "noise", "empty", "header", *(["json"] * 6 if path.suffix == ".json" else [])]
    )
    if how == "json":
        return _json_change(content, generator)
    if how == "empty":
        return how, b""
    at = generator.randrange(min(len(content), 2000) if generator.random() < 0.7 else len(content))
    if how == "cut":
        return f"cut at {at}", content[:at]
    if how == "header":
        return how, generator.choice([0, 2, 2**20, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little") + content[8:]
    if how == "flip":
        return f"bit at {at}", content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :]
    noise = generator.randbytes(generator.randrange(1, 40))
    return f"noise at {at}", content[:at] + noise + content[at + len(noise) :]


def _json_change(content: bytes, generator: random.Random) -> tuple[str, bytes]:
    values = json.loads(content)
    if not isinstance(values, dict) or generator.random() < 0.1:
        return "another JSON", generator.choice([b"[1]", b"3", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"nul"])
    place, key = values, generator.choice(list(values))
    while isinstance(place[key], dict) and place[key] and generator.random() < 0.7:
        place = place[key]
        key = generator.choice(list(place))
    if generator.random() < 0.15:
        del place[key]
        return f"without {key}", json.dumps(values).encode()
    place[key] = generator.choice(VALUES)
    return f"{key} = {str(place[key])[:20]}", json.dumps(values).encode()


def run(argv: list[str]) -> tuple[int, str]:
    """Run a command; return (exit code, stderr). Raises AssertionError for an exception, or more than one line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            code: Any = main(argv)
        except SystemExit as exit:
            code = exit.code
    text = err.getvalue()
    assert code in (0, 1, 2), code
    assert len(text.splitlines()) <= 1, text
    assert (code == 0) == (text == ""), text
    return code, text


def fuzz(runs: int, seed: int) -> Iterator[tuple[str, int, str]]:
    """Yield (a description of the change, the exit code, the line on stderr)."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        whole = folders(root)
        for _ in range(runs):
            kind = generator.choice(list(whole))
            changed, out = root / "changed", root / "out"
            shutil.copytree(whole[kind], changed)
            path = generator.choice(sorted(p for p in changed.iterdir() if p.is_file()))
            what, content = changes(path, generator)
            path.write_bytes(content)
            what = f"{kind}/{path.name}: {what}"
            try:
                code, line = run(command(kind, whole, changed, out))
            except BaseException as error:
                raise AssertionError(what) from error
            yield what, code, line
            shutil.rmtree(changed)
            shutil.rmtree(out, ignore_errors=True)


def _main() -> None:
    runs, seed = (int(argument) for argument in [*sys.argv[1:], *("1000", "0")[len(sys.argv) - 1 :]])
    started = time.perf_counter()
    codes = [0, 0, 0]
    for what, code, line in fuzz(runs, seed):
        codes[code] += 1
        if code == 1:
            print(f"1: {what}: {line.strip()}")
    seconds = time.perf_counter() - started
    print(f"{runs} files: {codes[2]} refused, {codes[1]} failed, {codes[0]} accepted; no traceback; {seconds:.0f} s")


if __name__ == "__main__":
    _main()
