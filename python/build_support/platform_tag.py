"""Give wheels the manylinux tag that their libraries' own symbols justify.

    python -m python.build_support.platform_tag dist

The tag names the newest glibc whose symbols any library in the wheel asks for. libtorch_cpu.so stays outside: torch is
a dependency. The C++ runtime must be no newer than g++ 11's, which every distribution with glibc 2.34 has.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

OLDEST_GLIBC = (2, 17)
NEWEST_GLIBCXX = (3, 4, 29)
"""libstdc++ of g++ 11."""

Version = tuple[int, ...]


def newest(symbols: str, library: str) -> Version:
    """The newest version of `library` (GLIBC, GLIBCXX) that an `objdump -T` listing refers to; () if none."""
    found = re.findall(rf"\b{library}_(\d+(?:\.\d+)*)\b", symbols)
    return max((tuple(map(int, version.split("."))) for version in found), default=())


def platform_tag(wheel: Path) -> str:
    """manylinux_2_34_x86_64, by the libraries in `wheel`. Raises ValueError where the C++ runtime is too new."""
    glibc: Version = OLDEST_GLIBC
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as content:
        for name in content.namelist():
            if name.endswith(".so"):
                path = content.extract(name, folder)
                symbols = subprocess.run(["objdump", "-T", path], capture_output=True, text=True, check=True).stdout
                glibc = max(glibc, newest(symbols, "GLIBC"))
                if newest(symbols, "GLIBCXX") > NEWEST_GLIBCXX:
                    raise ValueError(f"{name} needs a newer libstdc++ than manylinux_2_34 promises")
    machine = wheel.stem.rsplit("linux_", 1)[1]
    return f"manylinux_{glibc[0]}_{glibc[1]}_{machine}"


def main() -> None:
    """Retags every wheel of a folder that still has the bare linux tag."""
    for wheel in sorted(Path(sys.argv[1]).glob("*-linux_*.whl")):
        tag = platform_tag(wheel)
        command = [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", tag, str(wheel)]
        subprocess.run(command, check=True, capture_output=True)
        print(f"{wheel.name}: {tag}")


if __name__ == "__main__":
    main()
