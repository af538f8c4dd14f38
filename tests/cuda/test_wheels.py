"""The sdist and the wheels are complete, correctly named, and work in a new environment."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

from python.build_support import check_wheels
from python.build_support.check_wheels import CPU_LIBRARY, CUDA_LIBRARY, BadWheel
from python.build_support.cuda import ARCHS_VARIABLE
from python.build_support.native import CSRC, ROOT, SKIP_VARIABLE
from qlora_kernels.backends import cuda
from qlora_kernels.backends.cuda.availability import read_build

from .launching import needs_library

NAME = "qlora_kernels-0.1.0+{}-cp310-abi3-manylinux_2_34_x86_64.whl"


def built(kind: str, source: Path, to: Path, **environment: str) -> Path:
    """Build an sdist or wheel of `source` with setuptools."""
    command = f"from setuptools import build_meta; build_meta.build_{kind}({str(to)!r})"
    variables = {k: v for k, v in os.environ.items() if k != ARCHS_VARIABLE} | environment
    done = subprocess.run([sys.executable, "-c", command], cwd=source, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (result,) = to.iterdir()
    return result


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(built("sdist", ROOT, tmp_path_factory.mktemp("made"))) as content:
        content.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


def test_sdist_contains_build_inputs(unpacked_sdist: Path) -> None:
    needed = [path for path in CSRC.rglob("*") if path.is_file()]
    needed += [*(ROOT / "python" / "build_support").glob("*.py"), *(ROOT / "qlora_kernels").rglob("*.py")]
    missing = [path for path in needed if not (unpacked_sdist / path.relative_to(ROOT)).exists()]
    assert not missing
    assert not list(unpacked_sdist.rglob("*.so"))


@pytest.mark.parametrize(("archs", "name"), [("", "qlora_kernels-0.1.0+cpu-"), (None, "qlora_kernels-0.1.0-")])
def test_version_of_a_wheel_from_the_sdist(unpacked_sdist: Path, tmp_path: Path, archs: str | None, name: str) -> None:
    """The setup.cfg in an sdist does not remove the local version."""
    asked = {} if archs is None else {ARCHS_VARIABLE: archs}
    wheel = built("wheel", unpacked_sdist, tmp_path, **{SKIP_VARIABLE: "1", **asked})
    assert wheel.name.startswith(name)


@needs_library
def test_wheel_installs_and_runs(tmp_path: Path) -> None:
    """`make wheel` for the architectures of this tree's library, whose objects exist already, beside another build."""
    pytest.importorskip("auditwheel", reason="auditwheel gives the manylinux tag: make setup")
    (ROOT / "build").mkdir(exist_ok=True)
    of_another_build = Path(tempfile.mkdtemp(prefix="lib.", dir=ROOT / "build"))
    archs = read_build(cuda.LIBRARY).archs
    command = [
        "make",
        "-s",
        "wheel",
        f"PYTHON={sys.executable}",
        "READY=",
        f"DIST={tmp_path}",
        f"{ARCHS_VARIABLE}={archs}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    of_another_build.rmdir()
    (wheel,) = tmp_path.iterdir()
    assert check_wheels.archs_of(wheel) == [f"sm_{arch.removesuffix('+PTX')}" for arch in archs.split(";")]
    assert "kernels for each of" in done.stdout
    assert "ok" in done.stdout.splitlines()[-1]


@needs_library
def test_every_kernel_compiled_for_every_architecture() -> None:
    pytest.importorskip("triton", reason="cuobjdump comes with triton's wheel: make setup")
    kernels = check_wheels.kernels_by_arch(cuda.LIBRARY)
    archs = [f"sm_{arch.removesuffix('+PTX')}" for arch in read_build(cuda.LIBRARY).archs.split(";")]
    assert check_wheels.check_kernels(cuda.LIBRARY, archs) == len(kernels[archs[0]])
    for stem in (
        "dequantize_nf4",
        "quantize_nf4",
        "linear_nf4_small_m",
        "linear_nf4_pairs",
        "linear_nf4_gemm",
        "adamw_step",
    ):
        assert any(f"{stem}_kernel" in name for name in kernels[archs[0]]), stem
    with pytest.raises(BadWheel, match=r"said to be for .*sm_75"):
        check_wheels.check_kernels(cuda.LIBRARY, [*archs, "sm_75"])


def test_the_hopper_kernel_must_be_compiled_for_sm_90a_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gemm, wgmma = "_ZN5qlora22linear_nf4_gemm_kernelE", "_ZN5qlora23linear_nf4_wgmma_kernelE"
    library = Path("_C.abi3.so")

    def check(archs: list[str], **kernels: set[str]) -> int:
        monkeypatch.setattr(check_wheels, "kernels_by_arch", lambda _: kernels)
        return check_wheels.check_kernels(library, archs)

    assert check(["sm_80"], sm_80={gemm}) == 1
    assert check(["sm_80", "sm_90"], sm_80={gemm}, sm_90={gemm}, sm_90a={wgmma}) == 1
    assert check(["sm_80", "sm_90a"], sm_80={gemm}, sm_90a={gemm, wgmma}) == 1
    for archs, kernels in (
        (["sm_80", "sm_90"], {"sm_80": {gemm}, "sm_90": {gemm}}),
        (["sm_80", "sm_90a"], {"sm_80": {gemm}, "sm_90a": {gemm}}),
        (["sm_80"], {"sm_80": {gemm, wgmma}}),
        (["sm_80"], {"sm_80": {gemm}, "sm_90a": {wgmma}}),
    ):
        with pytest.raises(BadWheel, match="linear_nf4_wgmma"):
            check(archs, **kernels)


@needs_library
def test_cuda_library_uses_runtime_of_torch() -> None:
    check_wheels.check_runtime(cuda.LIBRARY, NAME.format("cu130.sm80"))
    with pytest.raises(BadWheel, match=r"must need libcudart\.so\.12, it needs .*libcudart\.so\.13"):
        check_wheels.check_runtime(cuda.LIBRARY, NAME.format("cu126.sm80"))


@pytest.mark.parametrize(
    ("local", "archs"), [("cpu", []), ("cu130.sm80", ["sm_80"]), ("cu130.sm80.sm90a", ["sm_80", "sm_90a"])]
)
def test_archs_in_a_name(local: str, archs: list[str]) -> None:
    assert check_wheels.archs_of(Path(NAME.format(local))) == archs


@pytest.mark.parametrize(
    "name",
    [
        "qlora_kernels-0.1.0-cp310-abi3-manylinux_2_34_x86_64.whl",  # does not name the contents
        NAME.format("cpu").replace("abi3", "cp310"),
        NAME.format("cpu").replace("manylinux_2_34", "linux"),
    ],
)
def test_invalid_wheel_names_are_refused(name: str) -> None:
    with pytest.raises(BadWheel, match="the name does not match"):
        check_wheels.archs_of(Path(name))


def wheel_of(folder: Path, local: str, **libraries: bytes) -> Path:
    wheel = folder / NAME.format(local)
    with zipfile.ZipFile(wheel, "w") as content:
        for backend, data in libraries.items():
            content.writestr(f"qlora_kernels/backends/{backend}/_C.abi3.so", data)
    return wheel


def test_invalid_wheel_contents_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadWheel, match="holds the libraries") as refusal:
        check_wheels.check_content(wheel_of(tmp_path, "cu130.sm80", cpu=b""))
    assert CPU_LIBRARY in str(refusal.value)
    assert CUDA_LIBRARY in str(refusal.value)
    extension = importlib.util.find_spec("numpy.random._mt19937")
    assert extension is not None
    assert extension.origin is not None
    uses_python = wheel_of(tmp_path, "cpu", cpu=Path(extension.origin).read_bytes())
    with pytest.raises(BadWheel, match="of one Python"):
        check_wheels.check_content(uses_python)
    monkeypatch.setattr(check_wheels, "MAX_BYTES_PER_ARCH", 1000)
    with pytest.raises(BadWheel, match="MB, the limit is"):
        check_wheels.check_content(uses_python)
