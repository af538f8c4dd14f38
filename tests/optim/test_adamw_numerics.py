"""The values of PagedAdamW's updates: the bits of its definition, clipping, and stochastic rounding.

The rounding of torch's kernels depends on the CPU. Bits are therefore compared with tests/optim/runs.py's DefinedAdamW,
and torch's results within a bound.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from qlora_kernels.optim import PagedAdamW, PagedAdamW8bit
from tests.support.tolerances import Expected, assert_within, gamma

from .runs import DefinedAdamW, assert_same, assert_same_states, groups, parameters, run, set_gradients


class TestNumerics:
    @pytest.mark.parametrize("arguments", [{}, {"lr": 1e-2, "weight_decay": 0.1}, {"betas": (0.3, 0.9)}], ids=str)
    def test_fp32_equals_definition_over_40_steps(self, where, arguments):
        expected, defined = run(lambda p: DefinedAdamW(p, **arguments), 40, params=parameters())
        actual, optimizer = run(lambda p: PagedAdamW(p, **arguments, **where), 40, params=parameters())
        assert_same(actual, expected)
        assert_same_states(optimizer, defined)

    @pytest.mark.parametrize(
        "torchs", [torch.optim.AdamW, partial(torch.optim.AdamW, fused=True)], ids=["default", "fused"]
    )
    def test_close_to_torch_over_1000_steps(self, torchs):
        """Each step rounds p twice; a state remembers 1 / (1 - beta2) steps of three roundings, an update both states.

        The rates add up to 1. An update is at most a few rates long, and most updates are shorter than one.
        """
        expected, _ = run(torchs, 1000)
        actual, _ = run(PagedAdamW, 1000)
        rounding, states = gamma(2 * 1000, torch.float32), 2 * gamma(3 * 1000, torch.float32)
        for a, b in zip(actual, expected, strict=True):
            if b.numel():
                value = b.detach().double()
                assert_within(a, Expected(value, 2 * (rounding * value.abs().max() + states).expand(value.shape)))

    def test_groups_and_absent_gradients(self, where):
        expected, defined = run(lambda p: DefinedAdamW(groups(p)), 30, missing=True, params=parameters())
        actual, optimizer = run(lambda p: PagedAdamW(groups(p), **where), 30, missing=True, params=parameters())
        assert_same(actual, expected)
        assert_same_states(optimizer, defined)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_16bit_parameters_are_updated_in_fp32_and_rounded_once(self, dtype):
        params = parameters(dtype)
        optimizer = PagedAdamW(params, lr=1e-2)
        mirror = [nn.Parameter(p.detach().float()) for p in params]
        fp32 = DefinedAdamW(mirror, lr=1e-2)
        for step in range(20):
            set_gradients(params, step)
            for p, m in zip(params, mirror, strict=True):
                m.grad = p.grad.float()
                m.data.copy_(p)
            optimizer.step()
            fp32.step()
            assert_same(params, [nn.Parameter(m.detach().to(dtype)) for m in mirror])
        assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())

    def test_8bit_states_follow_the_32bit_run(self):
        shape = (300, 257)

        def trajectory(make):
            torch.manual_seed(0)
            target = torch.randn(shape)
            weight = nn.Parameter(torch.zeros(shape))
            optimizer = make([weight])
            for _ in range(200):
                weight.grad = weight.detach() - target + 0.1 * torch.randn(shape)
                optimizer.step()
            return weight.detach(), target

        exact, target = trajectory(lambda p: PagedAdamW(p, lr=2e-2))
        eight, _ = trajectory(lambda p: PagedAdamW8bit(p, lr=2e-2))
        distance = (exact - target).norm()
        assert (eight - exact).norm() < 0.02 * exact.norm()  # relative to the distance from zero
        assert (eight - target).norm() < 1.15 * distance

    def test_layouts_other_than_contiguous(self):
        def make(cls):
            torch.manual_seed(0)
            params = [
                nn.Parameter(torch.randn(48, 100).T),
                nn.Parameter(torch.randn(2, 8, 16, 20).contiguous(memory_format=torch.channels_last)),
            ]
            optimizer = cls(params, lr=1e-2)
            for step in range(5):
                torch.manual_seed(step)
                for i, p in enumerate(params):
                    grad = torch.randn(p.shape)
                    p.grad = grad if (step + i) % 2 else torch.empty_like(p).copy_(grad)
                optimizer.step()
            return params, optimizer

        (expected, defined), (actual, optimizer) = make(DefinedAdamW), make(PagedAdamW)
        assert_same(actual, expected)
        for p, q in zip(actual, expected, strict=True):
            assert torch.equal(optimizer.state[p]["exp_avg"], defined.state[q]["exp_avg"])


class TestClip:
    @pytest.mark.parametrize("max_grad_norm", [0.5, 1e6])
    def test_equals_clip_grad_norm_and_leaves_the_gradients(self, max_grad_norm):
        expected, actual = parameters(), parameters()
        defined = DefinedAdamW(groups(expected))
        optimizer = PagedAdamW(groups(actual), max_grad_norm=max_grad_norm)
        for step in range(10):
            for params in (expected, actual):
                set_gradients(params, step)
            before = [p.grad.clone() for p in actual]
            torch.nn.utils.clip_grad_norm_(expected, max_grad_norm)
            defined.step()
            optimizer.step()
            assert all(torch.equal(p.grad, grad) for p, grad in zip(actual, before, strict=True))
        # The norm is summed in another order. A relative error of the gradients changes an update by twice that, times
        # lr.
        norm = gamma(sum(p.numel() for p in expected), torch.float32)
        for a, b in zip(actual, expected, strict=True):
            value = b.detach().double()
            error = 10 * 3e-3 * 2 * norm + gamma(2 * 10, torch.float32) * value.abs()
            assert_within(a, Expected(value, error))


class TestStochasticRounding:
    def test_small_updates_are_kept_on_average(self):
        def drift(stochastic_rounding):
            torch.manual_seed(3)
            weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
            optimizer = PagedAdamW([weight], lr=1e-4, weight_decay=0.0, stochastic_rounding=stochastic_rounding)
            for _ in range(100):
                weight.grad = torch.ones_like(weight)
                optimizer.step()
            return 1.0 - weight.detach().double().mean().item()

        assert drift(False) == 0.0  # each step is a quarter of bf16's spacing below one
        # 100 steps of 1e-4. One rounding has a variance below (2**-8)**2 / 4, 4096 elements, 100 steps: sigma < 3.1e-4.
        assert drift(True) == pytest.approx(1e-2, abs=4 * 3.1e-4)

    def test_numbers_are_drawn_from_torch_generator(self):
        def weights(seed):
            torch.manual_seed(seed)
            return run(lambda p: PagedAdamW(p, stochastic_rounding=True), 3, dtype=torch.bfloat16)[0]

        assert_same(weights(1), weights(1))
        assert any(not torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))

    def test_elements_and_parameters_draw_independently(self):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = PagedAdamW(params, lr=1e-3, weight_decay=0.0, stochastic_rounding=True)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))]})
        params += optimizer.param_groups[1]["params"]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        flags = torch.stack([p.detach().float() < 1 for p in params]).double()
        assert 0.1 < flags.mean() < 0.9
        assert torch.corrcoef(flags).triu(1).abs().max() < 0.06  # 4 sigma of 5000 draws
        assert torch.corrcoef(torch.stack([flags[0, :-1], flags[0, 1:]]))[0, 1].abs() < 0.06
