"""The native libraries. Everything that can be static stands in pyproject.toml.

QLORA_SKIP_NATIVE=1 builds none; CXX names the compiler; MAX_JOBS bounds the parallel compilations. QLORA_CUDA_ARCHS
says what the CUDA library is compiled for; where it is set, so does the version (0.1.0+cu130.sm80.sm90a, 0.1.0+cpu).
"""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))

from python.build_support.cpu import CpuLibrary
from python.build_support.cuda import CudaLibrary
from python.build_support.native import BuildNative, extension
from python.build_support.version import LocalVersion

setup(
    ext_modules=[extension(library) for library in (CpuLibrary(), CudaLibrary())],
    cmdclass={"build_ext": BuildNative, "egg_info": LocalVersion},
    # No symbol of Python is used, so one wheel serves every version from 3.10 on.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
