"""The instruction sets of the CPU library that this machine runs."""

from __future__ import annotations

from qlora_kernels.backends import cpu

ALL_SETS = ("amx_bf16", "amx_bf16_emulated", "avx512_bf16_fma", "avx512_bf16", "avx512", "avx2", "neon", "portable")


def runs_here(isa: str) -> bool:
    """Whether forcing `isa` succeeds; False where the library is missing."""
    if cpu.unavailable() is not None:
        return False
    try:
        return cpu.instruction_set(isa) == isa
    except ValueError:
        return False
    finally:
        cpu.instruction_set("")


SETS = [isa for isa in ALL_SETS if runs_here(isa)]
