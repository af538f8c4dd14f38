"""PagedAdamW and torch's AdamW side by side."""

from __future__ import annotations

import torch
from torch import nn

from qlora_kernels.optim import PagedAdamW
from tests.support.tolerances import Expected, assert_within, gamma, unit_roundoff

STATE_ERRORS = {
    # exp_avg + (1 - beta1) (grad - exp_avg): roundings of the second term are averaged as gradients are, and those of
    # the sum accumulate over 1 / (1 - beta1) = 10 steps. Gradients are standard normal: |grad - exp_avg| < 5, |exp_avg|
    # < 1.5.
    "exp_avg": lambda value, steps: (2 * 5 + 10 * 1.5) * unit_roundoff(torch.float32) * torch.ones_like(value),
    # A sum of squares, of which each term is rounded in four operations per step.
    "exp_avg_sq": lambda value, steps: gamma(4 * steps, torch.float32) * value,
}
"""A bound on the rounding error of a state after that many steps, for any order of operations."""


class Pair:
    """PagedAdamW and torch's AdamW, to which the same operations are applied."""

    def __init__(self, *shapes, **arguments):
        where = {name: arguments.pop(name) for name in ("page_dir", "state_bits") if name in arguments}
        torch.manual_seed(0)
        self.params = [[nn.Parameter(value) for value in map(torch.randn, shapes)]]
        self.params.append([nn.Parameter(p.detach().clone()) for p in self.params[0]])
        self.both = [
            PagedAdamW(self.params[0], **arguments, **where),
            torch.optim.AdamW(self.params[1], **arguments),
        ]
        self.seed = 0

    def change(self, function):
        """Call function(optimizer, params) for each optimizer."""
        for optimizer, params in zip(self.both, self.params, strict=True):
            function(optimizer, params)

    def steps(self, count=3):
        for _ in range(count):
            self.seed += 1
            for optimizer, params in zip(self.both, self.params, strict=True):
                generator = torch.Generator().manual_seed(self.seed)
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                optimizer.step()

    def check(self):
        """Assert that parameters and states agree within the rounding errors of both."""
        self.check_params()
        ours, theirs = (optimizer.state_dict()["state"] for optimizer in self.both)
        assert set(ours) == set(theirs)
        for key, state in theirs.items():
            for name, value in state.items():
                if name in STATE_ERRORS:
                    bound = STATE_ERRORS[name](value.double(), self.seed)
                    assert_within(ours[key][name], Expected(value.double(), 2 * bound), name)
                else:
                    assert torch.equal(ours[key][name], value), name

    def check_params(self):
        """A step rounds p twice. Its update is at most sqrt(t) rates at step t, because exp_avg**2 <= t exp_avg_sq, and
        is computed by ten operations from states whose own errors it inherits."""
        steps = self.seed
        travel = steps**1.5 * max(float(group["lr"]) for group in self.both[1].param_groups)
        update = gamma(10 + 4 * steps, torch.float32) + 25 * unit_roundoff(torch.float32)
        for a, b in zip(*self.params, strict=True):
            value = b.detach().double()
            error = gamma(2 * steps, torch.float32) * (value.abs() + travel) + update * travel
            assert_within(a, Expected(value, 2 * error), "parameter")
