"""The CUDA memories on simulated streams: correct for every interleaving, ahead of the kernel, and freed."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from qlora_kernels.ops import adamw_step as op
from qlora_kernels.optim import PagedAdamW, adamw_update
from qlora_kernels.optim.managed_memory import ManagedMemory, StagedMemory, cuda_memory
from qlora_kernels.optim.paging_plan import plan_chunks, plan_slots
from qlora_kernels.optim.state_placement import params_of

from .runs import assert_same, parameters, run, set_gradients
from .simulated_cuda import SimulatedDriver

CHUNK_BYTES = {32: 70_000, 8: 10_000}
MEMORIES = {"managed": ManagedMemory, "staged": StagedMemory}


class Simulation(PagedAdamW):
    """PagedAdamW whose memory and kernel launches use a SimulatedDriver."""

    driver: SimulatedDriver
    memory_class: type
    look_ahead: int

    def _memory(self, nbytes, chunks, device):
        slots, _ = plan_slots([p.numel() for p in params_of(self.param_groups)], self.state_bits)
        chunks = plan_chunks(slots, [0] * len(slots), CHUNK_BYTES[self.state_bits])
        assert len(chunks) > 3
        return self.memory_class(nbytes, chunks, self.driver, look_ahead=self.look_ahead)


def simulation(monkeypatch, kind, driver, look_ahead=1):
    """Return a factory of optimizers whose launches are enqueued on the driver's compute stream."""

    def launch(step):
        step = step._replace(params=list(step.params), grads=list(step.grads), steps=step.steps.clone())

        def kernel():
            driver.log.append(("update", int(step.segments[0, 3])))
            if kind == "managed":
                for row in step.segments.tolist():
                    segment = op.Segment(*row)
                    width = 4 if segment.exp_avg_absmax < 0 else 1
                    for offset in (segment.exp_avg, segment.exp_avg_sq):
                        driver.access(offset, offset + segment.numel * width)
            op.adamw_step(step)

        driver.enqueue("compute", kernel)

    monkeypatch.setattr(adamw_update, "run_adamw_step", launch)
    attributes = {"driver": driver, "memory_class": MEMORIES[kind], "look_ahead": look_ahead}
    return type("Simulated", (Simulation,), attributes)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("look_ahead", [0, 1, 2])
@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("kind", MEMORIES)
def test_every_interleaving_equals_resident_result_without_faults(monkeypatch, kind, state_bits, look_ahead, seed):
    expected, _ = run(lambda p: PagedAdamW(p, state_bits=state_bits), 4, missing=True)
    driver = SimulatedDriver(capacity=(look_ahead + 1) * (CHUNK_BYTES[state_bits] + 2048))
    optimizer_class = simulation(monkeypatch, kind, driver, look_ahead)
    rng = random.Random(seed)
    actual = parameters()
    optimizer = optimizer_class(actual, state_bits=state_bits)
    for step in range(4):
        set_gradients(actual, step, missing=True)
        optimizer.step()
        if rng.random() < 0.5:  # the host may run ahead by any number of steps
            driver.drain(rng)
    driver.drain(rng)
    assert_same(actual, expected)
    assert driver.faulted_bytes == 0
    assert optimizer.paging_report().prefetched_bytes > 0


def test_prefetches_are_enqueued_ahead_of_the_updates(monkeypatch):
    """The order in which a host that never waits enqueues work."""
    driver = SimulatedDriver()
    enqueued = []
    optimizer_class = simulation(monkeypatch, "managed", driver, look_ahead=1)
    inner = adamw_update.run_adamw_step
    monkeypatch.setattr(adamw_update, "run_adamw_step", lambda step: (enqueued.append("update"), inner(step)))
    monkeypatch.setattr(driver, "prefetch", lambda arena, start, stop: enqueued.append("prefetch"))
    # One parameter of equal chunks, each of two ranges, exp_avg and exp_avg_sq.
    params = [nn.Parameter(torch.ones(8 * 4096))]
    optimizer = optimizer_class(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    chunk = ["prefetch", "prefetch"]
    assert enqueued == [*chunk, *chunk, "update", *chunk, "update", *chunk, "update", "update"]
    assert driver.synchronized == []  # no host synchronization


def test_missing_wait_is_detected(monkeypatch):
    """Checks the simulation: without the event between fetch and compute, some interleaving is wrong."""
    expected, _ = run(lambda p: PagedAdamW(p), 2)

    def differs(seed):
        driver = SimulatedDriver()
        wait = driver.wait
        monkeypatch.setattr(driver, "wait", lambda stream, event: stream == "compute" or wait(stream, event))
        optimizer_class = simulation(monkeypatch, "staged", driver)
        actual, _ = run(optimizer_class, 2)
        driver.drain(random.Random(seed))
        return any(not torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    assert any(differs(seed) for seed in range(6))


def test_chunks_without_gradients_are_not_fetched(monkeypatch):
    driver = SimulatedDriver()
    optimizer_class = simulation(monkeypatch, "managed", driver)
    params = parameters()
    optimizer = optimizer_class(params)
    params[-1].grad = torch.ones_like(params[-1])
    optimizer.step()
    driver.drain(random.Random(0))
    lowest = optimizer._placement.arenas[0].slots[-1].exp_avg
    assert min(start for kind, start in driver.log if kind == "prefetch") >= lowest - CHUNK_BYTES[32]
    assert optimizer.paging_report().prefetched_bytes < optimizer.paging_report().state_bytes


def test_captured_graphs_hold_no_prefetch(monkeypatch):
    driver = SimulatedDriver()
    driver.captured = True
    optimizer_class = simulation(monkeypatch, "managed", driver)
    expected, _ = run(lambda p: PagedAdamW(p), 1)
    actual, _ = run(optimizer_class, 1)
    driver.drain(random.Random(0))
    assert {kind for kind, _ in driver.log} == {"update"}
    assert driver.events == 0
    assert_same(actual, expected)


def test_staged_states_settled_before_host_reads(monkeypatch):
    driver = SimulatedDriver()
    optimizer_class = simulation(monkeypatch, "staged", driver)
    _, expected = run(lambda p: PagedAdamW(p), 2)
    _, optimizer = run(optimizer_class, 2)
    saved = optimizer.state_dict()["state"]
    assert driver.synchronized == ["write_back"]
    for key, state in expected.state_dict()["state"].items():
        assert torch.equal(saved[key]["exp_avg_sq"], state["exp_avg_sq"])


@pytest.mark.parametrize("kind", MEMORIES)
def test_allocation_failures_raise_without_leaks(monkeypatch, kind):
    allocations = 1 if kind == "managed" else 3
    for failing in range(1, allocations + 1):
        driver = SimulatedDriver(fail_allocation=failing)
        with pytest.raises(RuntimeError, match=r"cudaMallocManaged: \d+ bytes: out of memory"):
            simulation(monkeypatch, kind, driver)(parameters())
        assert driver.allocations == failing
        assert driver.live == 0


@pytest.mark.parametrize("kind", MEMORIES)
def test_memory_is_freed_on_close_and_with_the_last_reference(monkeypatch, kind):
    for release in ("close", "del"):
        driver = SimulatedDriver()
        _, optimizer = run(simulation(monkeypatch, kind, driver), 2)
        driver.drain(random.Random(0))
        assert driver.live == (1 if kind == "managed" else 3)
        if release == "close":
            optimizer.close()
        else:
            del optimizer
        assert driver.live == 0


@pytest.mark.parametrize(
    ("concurrent", "kind", "said"),
    [(None, "resident", "the CUDA library is missing"), (False, "staged", "no concurrent managed access")],
)
def test_fallback_memory_warns_once(monkeypatch, recwarn, concurrent, kind, said):
    from qlora_kernels.optim import managed_memory

    managed_memory._say_once.cache_clear()
    monkeypatch.setattr(managed_memory, "managed_concurrent_access", lambda device: concurrent)
    monkeypatch.setattr(managed_memory, "CudaDriver", lambda device: SimulatedDriver())
    for _ in range(2):
        assert cuda_memory(64, (), torch.device("cpu"), look_ahead=1).kind == kind
    assert [said in str(w.message) for w in recwarn] == [True]
