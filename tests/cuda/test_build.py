"""How the CUDA library and the wheels are described: architectures, versions, platform tags."""

from __future__ import annotations

import pytest

from python.build_support import cuda
from python.build_support.platform_tag import newest


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


@pytest.mark.parametrize("archs", ["sm_80", "8.0", "native", "80;turing"])
def test_unknown_architectures_are_refused(archs: str) -> None:
    with pytest.raises(ValueError, match="QLORA_CUDA_ARCHS: must be like"):
        cuda.gencode(archs)


def test_all_means_every_shipped_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.ARCHS_VARIABLE, "all")
    assert len(cuda.gencode(cuda.requested_archs())) == 7, "six binaries, and PTX of the last"


@pytest.mark.skipif(cuda.cuda_home() is None, reason="the version of nvcc is part of the tag: put nvcc on PATH")
def test_version_says_what_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.ARCHS_VARIABLE, "80;90a")
    assert cuda.local_version().startswith("cu13")
    assert cuda.local_version().endswith(".sm80.sm90a")
    monkeypatch.setenv(cuda.ARCHS_VARIABLE, "")
    assert cuda.local_version() == "cpu"


def test_newest_symbol_version() -> None:
    listing = "0 DF *UND* 0 GLIBC_2.2.5 free\n0 DF *UND* 0 (GLIBC_2.34) dlopen\n0 DF *UND* 0 GLIBCXX_3.4.9 x"
    assert newest(listing, "GLIBC") == (2, 34)
    assert newest(listing, "GLIBCXX") == (3, 4, 9)
    assert newest(listing, "CXXABI") == ()
