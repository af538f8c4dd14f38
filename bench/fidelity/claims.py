"""All claims, in the order in which they are measured and stand on the page."""

from __future__ import annotations

from . import (
    adalora,
    bits,
    classification,
    error,
    finetuning,
    lowrank,
    memory,
    perplexity,
    rates,
    rslora,
    scale,
    start,
)
from .claim import Claim

CLAIMS: dict[str, Claim] = {
    module.CLAIM.name: module.CLAIM
    for module in (
        bits,
        memory,
        error,
        perplexity,
        start,
        scale,
        finetuning,
        lowrank,
        rslora,
        rates,
        classification,
        adalora,
    )
}
