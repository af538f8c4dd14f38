"""The count of waits for memory at the head of a main loop, on short loops of SASS."""

from __future__ import annotations

from python.kernels_report.early_waits import Instruction, early_waits


def count(text: str) -> int:
    """early_waits of a loop, one instruction a line."""
    lines = [line.split(maxsplit=1) for line in text.strip().splitlines()]
    return early_waits([Instruction(op, operands) for op, operands in lines])


COPIES = "LDGSTS.E.BYPASS.128 [R17], desc[UR10][R14.64]"
LOADS = "LDG.E.CONSTANT R7, desc[UR10][R24.64]\nLDG.E.U8.CONSTANT R6, desc[UR10][R26.64]"
PRODUCT = "HMMA.16816.F32.BF16 R44, R32, R28, R44"


def test_independent_loads_do_not_wait() -> None:
    assert count(f"{COPIES}\n{LOADS}\n{PRODUCT}\nFMUL R9, R7, R6\nSTS [R3], R9") == 0


def test_dependent_loads_and_instructions_that_use_them_are_counted() -> None:
    chain = "IMAD.WIDE.U32 R8, R6, 0x4, R2\nLDG.E.CONSTANT R10, desc[UR10][R8.64]\nFADD R11, R10, R4"
    assert count(f"{COPIES}\n{LOADS}\n{chain}\n{PRODUCT}") == 3


def test_an_overwritten_register_is_no_longer_waited_for() -> None:
    assert count(f"{LOADS}\nMOV R7, R1\nFMUL R9, R7, R7\n{PRODUCT}") == 0


def test_both_registers_of_an_address_and_all_of_a_wide_load_are_followed() -> None:
    assert count(f"LDG.E.128 R8, desc[UR4][R2.64]\nFADD R1, R1, R11\n{PRODUCT}") == 1
    assert count(f"LDG.E R9, desc[UR4][R2.64]\nLDGSTS.E [R20], desc[UR4][R8.64]\n{PRODUCT}") == 1


def test_without_tensor_cores_only_addresses_wait() -> None:
    assert count(f"{LOADS}\nFFMA R9, R7, R7, R9\nLDS R10, [R11]") == 0
    assert count(f"{LOADS}\nIMAD R12, R6, 0x4, R13\nLDS R10, [R12]") == 1
