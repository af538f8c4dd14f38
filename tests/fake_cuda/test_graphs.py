"""CUDA graphs: a captured step replays on new data, and operations that capture forbids raise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qlora_kernels as qk
from tests.support.problems import gaussian


def run(steps: int, captured: bool) -> list[Tensor]:
    """Return losses and adapters of `steps` training steps on changing data."""
    torch.manual_seed(0)
    packed, state = qk.quantize_nf4(gaussian(24, 64).cuda())
    A, B = (torch.nn.Parameter(gaussian(*shape, seed=3).cuda()) for shape in ((4, 64), (24, 4)))
    x = torch.zeros(5, 64, dtype=torch.bfloat16, device="cuda")
    optimizer = qk.PagedAdamW([A, B], lr=1e-2)
    for param in (A, B):
        param.grad = torch.zeros_like(param)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        y = qk.linear_nf4_lora(x, packed, state, A, B, scaling=2.0)
        loss = y.float().square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def new_data(i: int) -> None:
        with torch.no_grad():
            x.copy_(gaussian(5, 64, seed=10 + i, dtype=torch.bfloat16))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        new_data(-1)
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph):
            loss = step()
    losses = []
    for i in range(steps):
        new_data(i)
        if captured:
            graph.replay()
        else:
            loss = step()
        losses.append(loss.clone())
    torch.cuda.synchronize()
    return [*losses, A.detach(), B.detach()]


def test_training_step_replays_on_new_data() -> None:
    """Forward, backward and PagedAdamW's step in one graph, bit-equal to eager steps."""
    with qk.use_backend("cuda"):
        for captured, eager in zip(run(3, True), run(3, False), strict=True):
            assert torch.equal(captured.cpu(), eager.cpu())


@pytest.mark.parametrize("first_step_captured", [True, False])
def test_address_tables_of_captured_graph_are_kept(first_step_captured: bool) -> None:
    """A captured step of PagedAdamW is replayed after eager steps with gradients at other addresses."""

    def train(captured: bool) -> Tensor:
        param = torch.nn.Parameter(gaussian(300, seed=1).cuda())
        static, optimizer = gaussian(300, seed=2).cuda(), qk.PagedAdamW([param], lr=1e-2)
        kept = []

        def step(grad: Tensor) -> None:
            param.grad = grad
            optimizer.step()

        if not first_step_captured:
            step(static)
        graph = torch.cuda.CUDAGraph()
        if captured:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                step(static)
        for i in range(70):
            kept.append(gaussian(300, seed=3 + i).cuda())
            step(kept[-1])
        kept.append(torch.randint(1 << 20, (64, 8), device="cuda"))  # reuses memory of freed tables
        if captured:
            graph.replay()
        else:
            step(static)
        torch.cuda.synchronize()
        return param.detach().cpu()

    with qk.use_backend("cuda"):
        assert torch.equal(train(True), train(False))


def test_a_wait_during_capture_is_an_error() -> None:
    """The fake device refuses it as a real one does; otherwise a graph could replay without an op."""
    x = torch.ones(4, device="cuda")

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.cuda.current_stream().synchronize()
            x.add_(1)

    with pytest.raises(RuntimeError, match="captur"):
        capture()
