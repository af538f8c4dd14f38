"""The version's local part, which says what a wheel's CUDA library is compiled for."""

from __future__ import annotations

import os

from setuptools.command.egg_info import egg_info

from .cuda import ARCHS_VARIABLE, local_version


class LocalVersion(egg_info):
    """egg_info that puts it behind the version of pyproject.toml, where QLORA_CUDA_ARCHS is set."""

    def finalize_options(self) -> None:
        """Append the local version to the distribution's version."""
        # Here and not as an option of setup(): the setup.cfg that an sdist carries would override that.
        if ARCHS_VARIABLE in os.environ:
            self.tag_build = f"+{local_version()}"
        super().finalize_options()
