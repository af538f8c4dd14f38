"""Host time of layer calls of both GPU backends under a stock torch and Triton, whose launches do nothing here.

    .venv-cuda/bin/python -m tests.support.fake_cuda.host_time [--profile CALL]

CPU time of the process. The fake driver answers a launch at once; a real one takes one to three microseconds for each.
LoRA calls of the cuda backend are left out: they include torch's own kernels, which Python serves here.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any


def measure(settings: list[Any], calls: Callable[[], dict[str, Callable[[], object]]], profiled: str | None) -> None:
    """Print the microseconds of each call under the settings, or the profile of one of them."""
    from bench.gpu_check.host_time import microseconds

    with ExitStack() as stack:
        for context in settings:
            stack.enter_context(context)
        for name, call in calls().items():
            if profiled is None:
                sys.stdout.write(f"{name:<36} {microseconds(call, 10, 300, time.process_time):6.1f} us\n")
            elif profiled in name:
                microseconds(call, 10, 1)
                with cProfile.Profile() as profile:
                    for _ in range(2000):
                        call()
                sys.stdout.write(f"{name}, 2000 calls\n")
                pstats.Stats(profile).sort_stats("tottime").print_stats(30)


def main() -> None:
    """Print the microseconds of each call."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", metavar="CALL", help="profile the calls whose names contain this text")
    profiled = parser.parse_args().profile
    from tests.support import fake_cuda

    device = fake_cuda.activate()
    import qlora_kernels as qk
    from bench.gpu_check.cases import Sizes
    from bench.gpu_check.host_time import layer_calls
    from qlora_kernels.backends.cuda.routing import use_path
    from qlora_kernels.backends.triton.planner import Plan, use_plan
    from tests.support.fake_cuda import host_ops

    host_ops.install()
    ways: list[tuple[str, int, list[Any]]] = [
        ("triton", 1, [use_plan("linear_nf4", Plan("small_m", 1, 4, 512, num_warps=1))]),
        ("triton", 64, [use_plan("linear_nf4", Plan("fused", 64, 64, 64))]),
        ("cuda", 1, [use_path("small_m")]),
        ("cuda", 64, [use_path("fused")]),
    ]
    for backend, M, paths in ways:

        def calls(backend: str = backend, M: int = M) -> dict[str, Callable[[], object]]:
            named = layer_calls(Sizes(M, 512, 512)).items()
            return {f"{backend} M={M} {name}": call for name, call in named if backend == "triton" or name == "linear"}

        settings = [device.launches_ignored(), qk.use_backend(backend), *paths]
        if backend == "triton":
            settings.append(use_plan("linear_nf4_grad_x", Plan("fused", 64, 64, 64)))
        measure(settings, calls, profiled)


if __name__ == "__main__":
    main()
