"""Host time of layer calls in Triton under a stock torch and Triton, whose launches do nothing here.

    .venv-cuda/bin/python -m tests.support.fake_cuda.host_time

CPU time of the process. The fake driver answers a launch at once; a real one takes one to three microseconds for each.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack


def main() -> None:
    """Print the microseconds of each call."""
    from tests.support import fake_cuda

    device = fake_cuda.activate()
    import qlora_kernels as qk
    from bench.gpu_check.cases import Sizes
    from bench.gpu_check.host_time import layer_calls, microseconds
    from qlora_kernels.backends.triton.planner import Plan, use_plan
    from tests.support.fake_cuda import host_ops

    host_ops.install()
    for M, plan in ((1, Plan("small_m", 1, 4, 512, num_warps=1)), (64, Plan("fused", 64, 64, 64))):
        with ExitStack() as stack:
            for context in (
                device.launches_ignored(),
                qk.use_backend("triton"),
                use_plan("linear_nf4", plan),
                use_plan("linear_nf4_grad_x", Plan("fused", 64, 64, 64)),
            ):
                stack.enter_context(context)
            for name, call in layer_calls(Sizes(M, 512, 512)).items():
                sys.stdout.write(f"M={M:<3} {name:<27} {microseconds(call, 10, 300, time.process_time):6.1f} us\n")


if __name__ == "__main__":
    main()
