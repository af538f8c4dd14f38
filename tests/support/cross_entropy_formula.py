"""linear_cross_entropy in float64, with bounds on the error of any correct computation of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .tolerances import Expected, exactly, gamma, product, unit_roundoff

U = unit_roundoff(torch.float32)
EXP = 4.0
"""Roundings of an exponential function, in addition to those of its argument."""
RISE = 5.0
"""Maximum by which a logit may exceed the number that is subtracted before its exponential is computed."""
TANH = 2.0**-21
"""Absolute error of tanh."""


@dataclass(frozen=True)
class Loss:
    """losses [M] and rows [M, K], the gradients of the losses with respect to hidden."""

    losses: Expected
    rows: Expected


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    rounds_gradient: bool = False,
) -> Loss:
    """Return the op's results. weight is rounded to hidden's dtype, probabilities may be; sums are fp32.

    rounds_gradient: the gradient of the logits, p - 1 for the label, may be rounded to hidden's dtype as a whole.

    A logit's error delta changes its probability by the factor exp(delta), and the log of the sum of exponentials by
    the mean of the deltas, weighted by the probabilities. The exponential of x has the error of EXP roundings and
    that of x, 3 |x| roundings. The sum of V exponentials has no cancellation: gamma(V), relative.
    """
    w = exactly(weight.to(hidden.dtype))
    z = product(exactly(hidden), w.T)
    if bias is not None:
        z = z + exactly(bias)
    z = z.scaled(logit_scale)
    slope = Expected(torch.ones_like(z.value), torch.zeros_like(z.value))
    if softcap:
        t = torch.tanh(z.value / softcap)
        error = z.error + 4 * U * z.magnitude + softcap * TANH + 2 * U * softcap
        z = Expected(softcap * t, error)
        slope = Expected(1 - t * t, 2 * error / softcap + 8 * U)
    learned = labels != ignore_index
    chosen = labels.where(learned, 0)[:, None]
    log_sums = z.value.logsumexp(1, keepdim=True)
    span = (z.value - z.value.amax(1, keepdim=True)).abs() + RISE
    p = torch.exp(z.value - log_sums)
    # Relative errors of each exponential, then of the sum, whose terms are weighted by p.
    of_exp = z.error + (EXP + 3 * span + 2) * U
    of_sum = (p * of_exp).sum(1, keepdim=True) + gamma(z.value.shape[1], torch.float32) + z.value.shape[1] * 2.0**-126
    log_sum_error = of_sum + 8 * U * (log_sums.abs() + span.amax(1, keepdim=True) * p.amax(1, keepdim=True) + RISE + 2)
    loss = (log_sums - z.value.gather(1, chosen)).squeeze(1)
    loss_error = (log_sum_error + z.error.gather(1, chosen)).squeeze(1) + 2 * U * loss.abs()

    rounded = 0.0 if hidden.dtype == torch.float32 else unit_roundoff(hidden.dtype)
    of_p = p * (of_exp + of_sum + 12 * U + rounded) + 2.0**-120
    onehot = torch.zeros_like(p).scatter_(1, chosen, 1.0)
    coefficient = (p - onehot) * slope.value
    coefficient_error = (of_p + onehot * log_sum_error + 4 * U * (p - onehot).abs()) * slope.magnitude
    coefficient_error = coefficient_error + (p - onehot).abs() * slope.error
    if rounds_gradient:
        coefficient_error = coefficient_error + rounded * coefficient.abs()
    rows = product(Expected(coefficient, coefficient_error), w).scaled(logit_scale).to(hidden.dtype)
    keep = learned[:, None]
    return Loss(Expected(loss, loss_error).masked(learned), rows.masked(keep))
