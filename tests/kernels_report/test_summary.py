"""The committed summary of the compiled kernels is that of the present kernels."""

from __future__ import annotations

import pytest

from python.kernels_report import sources


def test_summary_is_of_the_present_kernels() -> None:
    page = (sources.ROOT / "docs" / "kernels" / "summary.md").read_text()
    assert sources.fingerprints() in page, (
        "the kernels have changed since docs/kernels/summary.md was made: run `make kernels-report`"
    )


KERNEL = '''
@triton.jit
def kernel(p_x, N):
    """Say something."""
    o = tl.arange(0, N)  # the offsets
    tl.store(p_x + o, 0.0)

def launcher(x):
    return x
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("Say something.", "Say something else.\\n\\n    At length.", True),
        ("# the offsets", "# all offsets", True),
        ("return x", "return 2 * x", True),
        ("p_x + o, 0.0", "p_x + o, 1.0", False),
        ("p_x, N", "p_x, M", False),
    ],
)
def test_fingerprint_is_of_the_code(old: str, new: str, same: bool) -> None:
    before, after = (list(sources.functions_on_the_gpu(text)) for text in (KERNEL, KERNEL.replace(old, new)))
    assert len(before) == len(after) == 1
    assert (sources.fingerprint(before, "#") == sources.fingerprint(after, "#")) == same
