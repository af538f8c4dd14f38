"""qlora_kernels: NF4 codec, fused quantized-LoRA linear layers, paged AdamW and PEFT methods.

Importing this package needs neither a GPU, nor Triton, nor the compiled libraries, nor a network. The public names are
imported in `_public.py`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any


def _is_the_command() -> bool:
    """Whether this process is the command `qlora-kernels`, which parses its arguments before it imports torch."""
    # The script that pip installs; Windows adds .exe.
    if PurePath(sys.argv[0] if sys.argv else "").name in ("qlora-kernels", "qlora-kernels.exe"):
        return True
    # python -m qlora_kernels.cli: sys.argv[0] is "-m" while the parents of the module are imported.
    command = sys.orig_argv
    return "-m" in command and command[command.index("-m") + 1 :][:1] == ["qlora_kernels.cli"]


if TYPE_CHECKING or not _is_the_command():
    from . import _public
    from ._public import *  # noqa: F403

    __all__ = ["__version__"]  # noqa: F405
    __all__ += _public.__all__  # type: ignore[has-type]


def __getattr__(name: str) -> Any:
    """Return `__version__` from the installed package's metadata; in the command, import the public names."""
    if name == "__version__":
        from importlib.metadata import version

        return version("qlora_kernels")
    if _is_the_command() and not name.startswith("_"):
        public = import_module("._public", __name__)
        names = getattr(public, "__all__", ())  # () while this import of it is still under way
        # Also replaces the subpackage `backends`, which an import has put here, by the function of that name.
        globals().update({public_name: getattr(public, public_name) for public_name in names})
        if name in names:
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
