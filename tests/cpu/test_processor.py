"""The automatic choice of an instruction set on processors that are described by their cpuid, XCR0 and permissions."""

from __future__ import annotations

import subprocess
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import pytest

from python.build_support.cpu import X86, family_of
from python.build_support.native import CSRC, CannotBuild, tool
from qlora_kernels.backends import cpu

try:
    COMPILER = tool("CXX", "c++", "g++", "clang++")
except CannotBuild as reason:
    pytest.skip(str(reason), allow_module_level=True)
if family_of(COMPILER) is not X86:
    pytest.skip("the choice is among the instruction sets of x86", allow_module_level=True)

INTEL, AMD, HYGON, HIDDEN = "GenuineIntel", "AuthenticAMD", "HygonGenuine", "KVMKVMKVM"
FMA, OSXSAVE, AVX, F16C = 1 << 12, 1 << 27, 1 << 28, 1 << 29
AVX2, BMI2 = 1 << 5, 1 << 8
AVX512 = 1 << 16 | 1 << 17 | 1 << 30 | 1 << 31  # F, DQ, BW, VL
AMX = 1 << 22 | 1 << 24  # bf16, tile
AVX_VNNI, AVX512_BF16 = 1 << 4, 1 << 5
SSE4A = 1 << 6
SSE, YMM, ZMM, TILES = 0x3, 0x7, 0xE7, 0x600E7


@dataclass(frozen=True)
class Processor:
    """The arguments of tests/cpu/processor/check.cpp. The default is a Xeon with AMX whose kernel permits it."""

    vendor: str = INTEL
    leaf1_ecx: int = FMA | OSXSAVE | AVX | F16C
    leaf7_eax: int = 1
    leaf7_ebx: int = AVX2 | BMI2 | AVX512
    leaf7_edx: int = AMX
    leaf7_1_eax: int = AVX_VNNI | AVX512_BF16
    extended_ecx: int = 0
    xcr0: int = TILES
    permitted: int = 1


SAPPHIRE_RAPIDS = Processor()
COOPER_LAKE = replace(SAPPHIRE_RAPIDS, leaf7_edx=0, leaf7_1_eax=AVX512_BF16, xcr0=ZMM)
ICE_LAKE = replace(COOPER_LAKE, leaf7_eax=0, leaf7_1_eax=0)
HASWELL = replace(ICE_LAKE, leaf7_ebx=AVX2 | BMI2, xcr0=YMM)
ZEN_4 = replace(COOPER_LAKE, vendor=AMD, extended_ecx=SSE4A)
NO_AMX = "the processor has no AMX-BF16"
DENIED = "the kernel denied the permission to use AMX tile data (arch_prctl)"

PROCESSORS = {
    "Sapphire Rapids": (SAPPHIRE_RAPIDS, "amx_bf16", ""),
    "Sapphire Rapids, the permission is denied": (replace(SAPPHIRE_RAPIDS, permitted=0), "avx512_bf16_fma", DENIED),
    "Sapphire Rapids, tiles are not saved": (
        replace(SAPPHIRE_RAPIDS, xcr0=ZMM),
        "avx512_bf16_fma",
        "the operating system does not save AMX tile state (XCR0)",
    ),
    "Sapphire Rapids, AMX is masked": (replace(SAPPHIRE_RAPIDS, leaf7_edx=0), "avx512_bf16_fma", NO_AMX),
    "Sapphire Rapids, AMX has int8 alone": (replace(SAPPHIRE_RAPIDS, leaf7_edx=1 << 24), "avx512_bf16_fma", NO_AMX),
    "Sapphire Rapids, AVX512-BF16 is masked": (replace(SAPPHIRE_RAPIDS, leaf7_1_eax=AVX_VNNI), "avx512", ""),
    "Sapphire Rapids, another vendor is shown": (replace(SAPPHIRE_RAPIDS, vendor=HIDDEN), "amx_bf16", ""),
    "Cooper Lake": (COOPER_LAKE, "avx512_bf16_fma", NO_AMX),
    "Cooper Lake, another vendor is shown": (replace(COOPER_LAKE, vendor=HIDDEN), "avx512_bf16_fma", NO_AMX),
    "Ice Lake": (ICE_LAKE, "avx512", NO_AMX),
    "Ice Lake, leaf 7 has no subleaf 1": (replace(ICE_LAKE, leaf7_1_eax=AVX512_BF16), "avx512", NO_AMX),
    "Ice Lake, 512-bit registers are not saved": (replace(ICE_LAKE, xcr0=YMM), "avx2", NO_AMX),
    "Skylake-X without AVX512DQ": (replace(ICE_LAKE, leaf7_ebx=AVX2 | BMI2 | 1 << 16), "avx2", NO_AMX),
    "Alder Lake-N": (replace(HASWELL, leaf7_eax=1, leaf7_1_eax=AVX_VNNI), "avx2", NO_AMX),
    "Haswell": (HASWELL, "avx2", NO_AMX),
    "Haswell, 256-bit registers are not saved": (replace(HASWELL, xcr0=SSE), "portable", NO_AMX),
    "AVX2 without FMA": (replace(HASWELL, leaf1_ecx=OSXSAVE | AVX | F16C), "portable", NO_AMX),
    "an operating system without XSAVE": (
        replace(SAPPHIRE_RAPIDS, leaf1_ecx=FMA | AVX | F16C),
        "portable",
        "the operating system does not manage extended processor state (OSXSAVE)",
    ),
    "Zen 4": (ZEN_4, "avx512_bf16", NO_AMX),
    "Zen 5": (replace(ZEN_4, leaf7_1_eax=AVX_VNNI | AVX512_BF16), "avx512_bf16", NO_AMX),
    "Zen 4, another vendor is shown": (replace(ZEN_4, vendor=HIDDEN), "avx512_bf16", NO_AMX),
    "Zen 4, without SSE4A": (replace(ZEN_4, extended_ecx=0), "avx512_bf16", NO_AMX),
    "Zen 4, AVX512-BF16 is masked": (replace(ZEN_4, leaf7_1_eax=0), "avx512", NO_AMX),
    "Zen 3": (replace(ZEN_4, leaf7_ebx=AVX2 | BMI2, leaf7_1_eax=0, xcr0=YMM), "avx2", NO_AMX),
    "Hygon with AVX512-BF16": (replace(ZEN_4, vendor=HYGON, extended_ecx=0), "avx512_bf16", NO_AMX),
}
"""Name -> (processor, the set that is chosen, why there is no AMX)."""


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Return a function that runs the program: processor -> (set, reason, why no AMX, requests for permission)."""
    program = tmp_path_factory.mktemp("processor") / "check"
    sources = [
        Path(__file__).parent / "processor" / "check.cpp",
        CSRC / "cpu" / "processor.cpp",
        CSRC / "cpu" / "amx" / "support.cpp",
    ]
    names = program.with_name("names.cpp")
    names.write_text('#include "qlora/cpu_isa.h"\nnamespace qlora {\n' + isa_names() + "}\n", encoding="utf-8")
    includes = [f"-I{CSRC / 'include'}", f"-I{CSRC / 'cpu'}"]
    subprocess.run([COMPILER, "-std=c++20", "-Wall", "-Werror", *includes, *sources, names, "-o", program], check=True)

    def run(processor):
        arguments = [value if isinstance(value, str) else f"{value:x}" for value in astuple(processor)]
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        isa, reason, amx_reason, requests = done.stdout.strip().split("|")
        return isa, reason, amx_reason, int(requests)

    return run


def isa_names():
    """Return the definition of isa_name in isa.cpp, whose other functions need every table of kernels."""
    text = (CSRC / "cpu" / "isa.cpp").read_text(encoding="utf-8")
    begin = text.index("const char* isa_name(Isa isa) {")
    return text[begin : text.index("\n}\n", begin) + 3]


@pytest.mark.parametrize("name", PROCESSORS)
def test_choice(check, name):
    processor, isa, amx_reason = PROCESSORS[name]
    chosen, reason, found, _ = check(processor)
    assert (chosen, found) == (isa, amx_reason)
    assert reason


def test_tiles_requested_only_where_they_are_usable(check):
    """The request enlarges the frames of signal handlers for the rest of the process."""
    for processor, _, amx_reason in PROCESSORS.values():
        assert check(processor)[3] == int(amx_reason in ("", DENIED))


def test_reason_of_this_machine():
    if cpu.unavailable() is not None:
        pytest.skip("the library is not built")
    assert cpu.instruction_set_reason()
    try:
        cpu.instruction_set("portable")
        assert "was named" in cpu.instruction_set_reason()
    finally:
        cpu.instruction_set("")
    assert "was named" not in cpu.instruction_set_reason()
