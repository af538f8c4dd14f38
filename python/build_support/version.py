"""The local part of the version, which names the targets of a wheel's CUDA library."""

from __future__ import annotations

import os

from setuptools.command.egg_info import egg_info

from .cuda import ARCHS_VARIABLE, local_version


class LocalVersion(egg_info):
    """An egg_info command that appends it to the version of pyproject.toml if QLORA_CUDA_ARCHS is set."""

    def finalize_options(self) -> None:
        """Append the local version to the distribution's version."""
        # Not an option of setup(), because the setup.cfg in an sdist would override it.
        if ARCHS_VARIABLE in os.environ:
            self.tag_build = f"+{local_version()}"
        super().finalize_options()
