"""Compilation of sources and PTX to shared libraries, cached by content hash in build/cuda_host.

Modes: how the host code is compiled, and whose kernels its launches run.
    plain, asan, tsan               the .cu source through g++; with AddressSanitizer + UBSan; with ThreadSanitizer
    ptx, ptx-asan, ptx-tsan         nvcc's PTX of the same source, translated; launchers still through g++
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from .library import Library, Module
from .ptx.parser import Parameter
from .ptx.translate import Translation, translate
from .toolchain import CACHE, ROOT, cuda_includes, nvcc, versions

SOURCE_MODES = ("plain", "asan", "tsan")
PTX_MODES = ("ptx", "ptx-asan", "ptx-tsan")
MODES = SOURCE_MODES + PTX_MODES

_HERE = Path(__file__).parent
_RUNTIME = tuple(sorted((_HERE / "runtime").glob("*.cpp")))
_PRODUCT_INCLUDE = ROOT / "csrc" / "include"
_SM90A_HEADER = "qlora/ptx_sm90.cuh"
"""Sources that include this header are compiled to PTX for sm_90a, all others for sm_80."""

# -ffp-contract=off: g++ must not fuse operations. -w is only for CUDA's own headers, see _compile.
_COMMON = ("-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-omit-frame-pointer")
_SANITIZE = {
    "plain": ("-O2",),
    "asan": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fsanitize-sections=cuda_host_shared"),
    "tsan": ("-fsanitize=thread",),
}
# A translated kernel is one function with thousands of registers, for which the optimizer and UBSan take minutes. UBSan
# is not needed, because every operation of PTX is defined.
_TRANSLATED = {
    "plain": (),
    "asan": ("-O0", "-fsanitize=address", "--param", "asan-instrumentation-with-call-threshold=0"),
    "tsan": ("-O0", "-fsanitize=thread"),
}
_LIMIT_SECONDS = 1200


class CompilerError(RuntimeError):
    """A compiler failed; the message is the compiler's."""


def build(
    sources: Sequence[Path],
    mode: str = "plain",
    *,
    defines: Sequence[str] = (),
    include: Sequence[Path] = (),
    kernels: str = "",
) -> Library:
    """Compile CUDA C++ sources and load them in a worker process.

    sources: .cu files; their launchers must be `extern "C"`.   mode: one of MODES.
    defines: "NAME" or "NAME=VALUE".   include: folders beside csrc/include.
    kernels: a regular expression; only kernels whose mangled names match are translated from PTX, because translation
    takes most of a build's time. A launch of another kernel fails and names it.
    Equal arguments give the same Library, whose worker process is kept.
    Raises CompilerError with the compiler's message.
    """
    return _library(tuple(sources), mode, tuple(defines), tuple(include), kernels)


@cache
def _library(
    sources: tuple[Path, ...], mode: str, defines: tuple[str, ...], include: tuple[Path, ...], kernels: str
) -> Library:
    return Library(_link(sources, mode, defines, include, kernels), _sanitizer(mode))


def prebuild(jobs: Iterable[tuple[Path, str, str]]) -> None:
    """Compile each (source, mode, kernels) on all cores, or MAX_JOBS, so that later builds find their libraries."""
    jobs = list(jobs)
    with ThreadPoolExecutor(_jobs()) as pool:
        # Objects that several libraries link are compiled first, so that each is compiled once.
        shared = {(s, _sanitizer(mode)): None for source, mode, _ in jobs for s in (*_RUNTIME, source)}
        list(pool.map(lambda job: compile_object(*job, (), ()), shared))
        list(pool.map(lambda job: _link((job[0],), job[1], (), (), job[2]), jobs))


def load_ptx(text: str, mode: str = "plain", name: str = "module.ptx") -> Module:
    """Translate PTX text (nvcc's or Triton's, sm_80 or sm_90a) and load its kernels in a worker process.

    mode: "plain", "asan" or "tsan".   name: used in reports with PTX line numbers.
    """
    translation = translate(text, name)
    source = store_text(translation.cpp, ".cpp")
    objects = [compile_object(s, mode, (), ()) for s in (source, *_RUNTIME)]
    return Module(_shared_library(objects, mode), mode, translation.parameters, translation.unsupported)


def emit_ptx(source: Path, defines: Sequence[str] = (), include: Sequence[Path] = ()) -> str:
    """Return nvcc's PTX of one .cu, for sm_90a if it uses that architecture's instructions, else for sm_80."""
    arch = "sm_90a" if _SM90A_HEADER in source.read_text() else "sm_80"
    folders = [f"-I{path}" for path in (_PRODUCT_INCLUDE, *include)]
    flags = ("-std=c++20", f"-arch={arch}", "-ptx", "-lineinfo", *[f"-D{d}" for d in defines], *folders)
    path = cached(
        _key(source, flags), ".ptx", lambda output: run_compiler([str(nvcc()), *flags, str(source), "-o", str(output)])
    )
    return path.read_text()


def translated_kernels(sources: Sequence[Path]) -> tuple[list[Path], dict[str, list[Parameter]]]:
    """Return objects of all kernels of `sources`, from nvcc's PTX, and of the runtime; and each kernel's parameters."""
    return translated_text([part for source in sources for part in _parts(emit_ptx(source))])


def translated_text(ptx: Iterable[str]) -> tuple[list[Path], dict[str, list[Parameter]]]:
    """Translate the kernels in PTX texts. Raises CompilerError if the emulator does not support an instruction."""
    texts, parameters = [], {}
    for translation in map(translate, ptx):
        if translation.unsupported:
            raise CompilerError(f"PTX the emulator does not know: {dict(translation.unsupported)}")
        texts.append(store_text(translation.cpp, ".cpp"))
        parameters |= translation.parameters
    with ThreadPoolExecutor(_jobs()) as pool:
        objects = pool.map(lambda path: compile_object(path, "plain", (), ()), (*texts, *_RUNTIME))
        return list(objects), parameters


_PART_BYTES = 300_000
"""Bytes of PTX in one translated source, for which g++ needs a third of a gigabyte; memory and time grow with it."""


def _parts(ptx: str) -> list[str]:
    """Split PTX text into parts, each with as many kernels as fit in _PART_BYTES, but at least one."""
    shared, *entries = _split(ptx)
    parts = [""]
    for entry in entries:
        if parts[-1] and len(parts[-1]) + len(entry) > _PART_BYTES:
            parts.append("")
        parts[-1] += entry
    return [shared + part for part in parts]


def _jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def _link(
    sources: tuple[Path, ...], mode: str, defines: tuple[str, ...], include: tuple[Path, ...], kernels: str
) -> Path:
    if mode not in MODES:
        raise ValueError(f"build: mode must be one of {MODES}, got {mode!r}")
    objects = [compile_object(s, _sanitizer(mode), defines, include) for s in (*sources, *_RUNTIME)]
    if mode in PTX_MODES:
        objects += [
            compile_object(_translated(s, defines, include, kernels), _sanitizer(mode), (), ()) for s in sources
        ]
    return _shared_library(objects, mode)


def _translated(source: Path, defines: tuple[str, ...], include: tuple[Path, ...], kernels: str) -> Path:
    translation = _translation(source, defines, include, kernels)
    if not translation.parameters:
        raise CompilerError(f"{source.name}: no kernel's name matches {kernels!r}")
    return store_text(translation.cpp, ".cpp")


def _translation(source: Path, defines: tuple[str, ...], include: tuple[Path, ...], kernels: str) -> Translation:
    text = only_kernels(emit_ptx(source, defines, include), kernels)
    translation: Translation = translate(text, f"{source.stem}.ptx", watches_operands=True)
    if translation.unsupported:
        raise CompilerError(f"{source.name}: PTX the emulator does not know: {dict(translation.unsupported)}")
    return translation


def only_kernels(ptx: str, pattern: str) -> str:
    """Return PTX text with the shared declarations and the kernels whose names match `pattern`."""
    shared, *entries = _split(ptx)
    return shared + "".join(entry for entry in entries if re.search(pattern, entry.split("(", 1)[0]))


def _split(ptx: str) -> list[str]:
    """Return the shared declarations, then each kernel."""
    return re.split(r"(?=^\.visible \.entry )", ptx, flags=re.MULTILINE)


def _sanitizer(mode: str) -> str:
    return mode.removeprefix("ptx-").replace("ptx", "plain")


def compile_object(source: Path, mode: str, defines: tuple[str, ...], include: tuple[Path, ...]) -> Path:
    flags = (*_COMMON, *(_TRANSLATED if source.parent == CACHE else _SANITIZE)[mode], *[f"-D{d}" for d in defines])
    flags += tuple(f"-I{path}" for path in (_HERE / "include", _PRODUCT_INCLUDE, *include))
    flags += tuple(f"-isystem{path}" for path in cuda_includes())
    flags += ("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function")
    kind = ("-x", "c++", "-include", "cuda_host.h") if source.suffix == ".cu" else ()
    command = ["g++", *flags, "-c", *kind, str(source)]
    return cached(_key(source, (*flags, *kind)), ".o", lambda output: run_compiler([*command, "-o", str(output)]))


def _shared_library(objects: Sequence[Path], mode: str) -> Path:
    sanitize = [flag for flag in _SANITIZE[_sanitizer(mode)] if flag.startswith("-fsanitize=")]
    key = hashlib.sha256("\n".join([*map(str, objects), *sanitize]).encode()).hexdigest()[:24]
    command = ["g++", "-shared", *sanitize, *map(str, objects), "-ldl"]
    return cached(key, ".so", lambda output: run_compiler([*command, "-o", str(output)]))


def _key(source: Path, flags: Sequence[str]) -> str:
    digest = hashlib.sha256("\n".join([versions(), *flags]).encode())
    digest.update(source.read_bytes())
    # CACHE is left out: translated sources include no file of it, and other threads add and remove folders there.
    folders = {_HERE / "include", _PRODUCT_INCLUDE, source.parent} - {CACHE}
    headers = [p for folder in folders for p in folder.rglob("*") if p.suffix in (".h", ".cuh")]
    for header in sorted(headers):
        digest.update(header.read_bytes())
    return f"{source.stem[:40]}-{digest.hexdigest()[:24]}"


def store_text(text: str, suffix: str) -> Path:
    key = hashlib.sha256(text.encode()).hexdigest()[:24]
    return cached(key, suffix, lambda output: output.write_text(text))


def cached(key: str, suffix: str, make: Callable[[Path], object]) -> Path:
    """Return the cached file; if it does not exist, make it under another name and rename it.

    If several processes need it, one makes it and the others wait.
    """
    path = CACHE / f"{key}{suffix}"
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{path.name}.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=CACHE) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = Path(folder) / path.name
            make(unfinished)
            os.replace(unfinished, path)
    return path


def run_compiler(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_SECONDS)
    if result.returncode != 0:
        raise CompilerError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
