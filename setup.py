"""The native libraries. Everything that can be static stands in pyproject.toml.

QLORA_SKIP_NATIVE=1 builds none; CXX names the compiler; MAX_JOBS bounds the parallel compilations.
"""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))

from python.build_support.cpu import CpuLibrary
from python.build_support.cuda import CudaLibrary
from python.build_support.native import BuildNative, extension

LIBRARIES = [CpuLibrary(), CudaLibrary()]

setup(
    ext_modules=[extension(library) for library in LIBRARIES],
    cmdclass={"build_ext": BuildNative},
    # No symbol of Python is used, so one wheel serves every version from 3.10 on.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
