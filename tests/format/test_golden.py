"""The codec compared with the bytes of bitsandbytes 0.50.2 (written by python/codegen/golden_vectors.py).

Every accepted difference is listed here and in docs/format.md with its cause; any other difference is a failure.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import qlora_kernels as qk
from qlora_kernels.format import double_quant, nf4, reference
from tests.support.problems import usable_backends

PATH = Path(__file__).parents[1] / "golden" / "nf4.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

with safe_open(PATH, "pt") as file:
    TENSORS = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, safe_open is no mapping
    BLOCKSIZES = {case: int(size) for case, size in file.metadata().items() if case != "bitsandbytes"}

DIVIDES_IN_SHORT_BLOCKS = {"tail-division"}
"""Its CPU backend computes w / absmax in a short last block, w * (1 / absmax) elsewhere; CUDA always multiplies."""
ZERO_TAIL = {"zero-block"}
"""Its CPU backend stores 1e-38 for an all-zero short block and 0 for a full one. Both dequantize to zero."""

cases = pytest.mark.parametrize("case", sorted(BLOCKSIZES))
backends = pytest.mark.parametrize("backend", usable_backends("quantize_nf4"))


@cases
@backends
def test_packed_bytes_and_absmax(case, backend):
    with qk.use_backend(backend):
        packed, state = qk.quantize_nf4(TENSORS[f"{case}/w"], BLOCKSIZES[case], double_quant=False)
    theirs = TENSORS[f"{case}/packed"]
    if case in DIVIDES_IN_SHORT_BLOCKS:
        w = TENSORS[f"{case}/w"]
        divided = torch.bucketize(w / w.abs().max(), nf4.boundaries()).to(torch.uint8)
        assert torch.equal(theirs, nf4.pack(divided))
        assert (packed.reshape(-1) != theirs).sum() == 1
    else:
        assert torch.equal(packed.reshape(-1), theirs)
    expected = TENSORS[f"{case}/absmax"].clone()
    if case in ZERO_TAIL:
        assert expected[-1] == torch.tensor(1e-38)
        expected[-1] = 0.0
    assert torch.equal(state.absmax, expected)


@cases
@backends
def test_double_quantization(case, backend):
    """Scales and offset are equal; a code differs only where theirs is not the nearest, or where the scale is zero."""
    absmax = TENSORS[f"{case}/absmax"]
    with qk.use_backend(backend):
        q, scale, offset = torch.ops.qlora_kernels.quantize_absmax(absmax)
    assert torch.equal(scale, TENSORS[f"{case}/absmax_scale"])
    assert torch.equal(offset, TENSORS[f"{case}/absmax_offset"])
    theirs = TENSORS[f"{case}/absmax_q"]
    differs = (q != theirs).nonzero().flatten()
    values = double_quant.dynamic_map().double()
    for i in differs.tolist():
        if scale[i // double_quant.NESTED_BLOCKSIZE] == 0:
            continue
        exact = (absmax[i] - offset).double() / scale[i // double_quant.NESTED_BLOCKSIZE].double()
        assert (values[q[i].int()] - exact).abs() < (values[theirs[i].int()] - exact).abs()


def test_golden_file_contains_accepted_8_bit_difference():
    absmax = TENSORS["coarse-absmax/absmax"]
    q, _, _ = double_quant.quantize_absmax(absmax)
    assert 0 < (q != TENSORS["coarse-absmax/absmax_q"]).sum() <= 4


@pytest.mark.parametrize("key", sorted(k for k in TENSORS if "/dequantized/" in k))
@backends
def test_dequantized_values_of_their_bytes(key, backend):
    case, _, dtype = key.split("/")
    state = qk.QuantState(
        TENSORS[f"{case}/w"].shape,
        TENSORS[f"{case}/w"].dtype,
        BLOCKSIZES[case],
        absmax_q=TENSORS[f"{case}/absmax_q"],
        absmax_scale=TENSORS[f"{case}/absmax_scale"],
        absmax_offset=TENSORS[f"{case}/absmax_offset"],
    )
    with qk.use_backend(backend):
        actual = qk.dequantize_nf4(TENSORS[f"{case}/packed"], state, DTYPES[dtype])
    assert torch.equal(actual, TENSORS[key])


@pytest.mark.parametrize(
    "mutate",
    [
        pytest.param(lambda p, s: (p << 4 | p >> 4, s), id="nibbles-swapped"),
        pytest.param(lambda p, s: (p, s - TENSORS["normal-fp32/absmax_offset"]), id="offset-dropped"),
    ],
)
def test_mutated_codec_is_detected(mutate):
    packed, scales = mutate(
        TENSORS["normal-fp32/packed"],
        double_quant.dequantize_absmax(*(TENSORS[f"normal-fp32/absmax_{k}"] for k in ("q", "scale", "offset"))),
    )
    expected = TENSORS["normal-fp32/dequantized/fp32"]
    assert not torch.equal(reference.dequantize_nf4(packed, scales, 64, expected.shape, torch.float32), expected)
