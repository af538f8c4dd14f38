"""Sizes of the linear layers that are timed. Without torch, for the process of the check."""

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
"""Weights [N, K]."""

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 1024, 4096, 16384)
"""Numbers of rows of x."""
