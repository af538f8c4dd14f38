"""Architectures and versions of the CUDA library. test_wheels.py tests the contents of wheels."""

from __future__ import annotations

import pytest

from python.build_support import cuda
from python.build_support.native import CannotBuild


@pytest.mark.parametrize(
    ("archs", "flags"),
    [
        ("", []),
        ("80", ["-gencode=arch=compute_80,code=sm_80"]),
        ("80;90a", ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]),
        ("120+PTX", ["-gencode=arch=compute_120,code=sm_120", "-gencode=arch=compute_120,code=compute_120"]),
    ],
)
def test_gencode(archs: str, flags: list[str]) -> None:
    assert cuda.gencode(archs) == flags


@pytest.mark.parametrize(
    ("archs", "flags"),
    [
        ("80+PTX", [*cuda.gencode("80+PTX"), "-DQLORA_WITHOUT_SM90A"]),
        ("80;90", cuda.gencode("90a")),
        ("90a", cuda.gencode("90a")),
        (cuda.ALL_ARCHS, cuda.gencode("90a")),
    ],
)
def test_the_hopper_kernel_is_compiled_for_sm_90a_alone_or_left_out(archs: str, flags: list[str]) -> None:
    (stem,) = cuda.SM90A_SOURCES
    assert cuda.source_flags(stem, archs) == flags
    assert cuda.source_flags("linear_nf4_gemm", archs) == cuda.gencode(archs)


@pytest.mark.parametrize("archs", ["sm_80", "8.0", "native", "80;turing"])
def test_unknown_architectures_are_refused(archs: str) -> None:
    with pytest.raises(ValueError, match="QLORA_CUDA_ARCHS: must be like"):
        cuda.gencode(archs)


def test_all_selects_every_shipped_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.ARCHS_VARIABLE, "all")
    assert len(cuda.gencode(cuda.requested_archs())) == 8, "six binaries, and PTX of the first and the last"


@pytest.mark.skipif(cuda.cuda_home() is None, reason="the version of nvcc is part of the tag: put nvcc on PATH")
def test_version_names_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.ARCHS_VARIABLE, "80;90a")
    assert cuda.local_version().startswith("cu13")
    assert cuda.local_version().endswith(".sm80.sm90a")
    monkeypatch.setenv(cuda.ARCHS_VARIABLE, "")
    assert cuda.local_version() == "cpu"


def test_requested_architectures_need_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build with QLORA_CUDA_ARCHS=80 never gives a wheel that is named as a CPU wheel."""
    monkeypatch.setenv(cuda.ARCHS_VARIABLE, "80")
    monkeypatch.setattr(cuda, "cuda_home", lambda: None)
    assert cuda.CudaLibrary().required
    with pytest.raises(CannotBuild, match="nvcc is not found"):
        cuda.local_version()
    monkeypatch.delenv(cuda.ARCHS_VARIABLE)
    assert not cuda.CudaLibrary().required
