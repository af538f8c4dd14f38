"""The GPU's shuffle tables for encoding, which the interpreter cannot run, agree with the boundaries exactly."""

from __future__ import annotations

import torch

from qlora_kernels.backends.triton.quantize_nf4 import CELLS, cell_of, cell_table
from qlora_kernels.format import nf4


def encode(x: float) -> int:
    """Compute as the inline PTX does; Python floats are fp64, in which the cell of an fp32 number is exact."""
    inside, count = cell_table()
    cell = cell_of(x)
    return count[cell] + (x > inside[cell])


def test_no_cell_holds_two_boundaries():
    cells = [cell_of(b) for b in nf4.boundaries().tolist()]
    assert len(set(cells)) == 15
    assert all(0 <= cell < CELLS for cell in cells)


def test_numbers_around_every_boundary_and_cell_edge():
    boundaries = nf4.boundaries()
    edges = torch.tensor([(cell - 15.5) / 15.0 for cell in range(1, CELLS - 1)], dtype=torch.float32)
    one = torch.tensor([-1.0, 1.0, 0.0, -0.0])
    points = torch.cat([boundaries, edges, one, torch.linspace(-1, 1, 4001)])
    points = torch.cat([points, torch.nextafter(points, points + 1), torch.nextafter(points, points - 1)]).clamp(-1, 1)
    expected = torch.bucketize(points, boundaries)
    assert [encode(x) for x in points.tolist()] == expected.tolist()
