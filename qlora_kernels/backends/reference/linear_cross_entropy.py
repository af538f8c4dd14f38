"""linear_cross_entropy composed of torch's ops, over a few tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.output_head import Head, grad_of_logits, logits_of

CHUNK = 256
"""Number of tokens whose logits are in memory at one time."""


def linear_cross_entropy(
    hidden: Tensor, labels: Tensor, head: Head, *, need_grad_hidden: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (losses, log_sums, rows) as the op of this name defines them."""
    weight = head.rows(0, head.V, hidden.dtype).float()
    losses, log_sums, rows = [], [], []
    for part, of_part in zip(torch.split(hidden, CHUNK), torch.split(labels, CHUNK), strict=True):
        z = logits_of(part.float(), weight, head, head.bias)
        log_sum = z.logsumexp(dim=1)
        learned = of_part != head.ignore_index
        chosen = z.gather(1, of_part.where(learned, 0)[:, None]).squeeze(1)
        losses.append(torch.where(learned, log_sum - chosen, 0.0))
        log_sums.append(log_sum)
        if need_grad_hidden:
            grad_z = torch.where(learned[:, None], grad_of_logits(z, log_sum, of_part, head), 0.0)
            rows.append((grad_z @ weight).to(hidden.dtype))
    return torch.cat(losses), torch.cat(log_sums), torch.cat(rows) if rows else hidden.new_empty(0)
