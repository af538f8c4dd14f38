"""All claims, in the order of the page: the cheapest first."""

from __future__ import annotations

from . import bits, error, finetuning, memory, perplexity, scale, start
from .claim import Claim

CLAIMS: dict[str, Claim] = {
    module.CLAIM.name: module.CLAIM for module in (bits, memory, error, perplexity, start, scale, finetuning)
}
