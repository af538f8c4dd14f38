"""The claims that the check verifies: one line each, with the prediction of bench/roofline.py and the measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .. import roofline
from .rows import Row
from .timed_sizes import ROWS


@dataclass(frozen=True)
class Claim:
    """A statement with its predicted value, and a function from rows to its measured value, None without such rows."""

    text: str
    predicted: str
    measured: Callable[[list[Row]], str | None]


def claims(capability: int) -> list[Claim]:
    """Return the claims for a GPU; other capabilities use the nearest one below in the model."""
    known = [c for c in roofline.GPUS if c <= capability]
    gpu = roofline.GPUS[max(known, default=min(roofline.GPUS))]
    kernel_us = {
        "small_m": {1: roofline.small_m_us(gpu)},
        "pairs": {M: roofline.pairs_us(gpu, M) for M in (4, 16, 64)},
        "fused": {M: roofline.fused_us(gpu, M) for M in (16, 64, 256)},
        "decode": {M: roofline.decoded_us(gpu, M) for M in (64, 256, 1024)},
    }
    if gpu is roofline.GPUS[90]:
        kernel_us["wgmma"] = {M: roofline.wgmma_us(gpu, M) for M in (16, 64, 128, 256, 1024)}
    ratios = roofline.training_us(gpu, 4096)
    return [
        *(
            Claim(f"{backend}: every result equals the CPU's within its bound", "all", _all_ok(backend))
            for backend in ("cuda", "triton")
        ),
        *(
            Claim(f"cuda {path}, 4096 x 4096, M={M}, us", f"{us:.1f}", _kernel(path, M))
            for path, by_rows in kernel_us.items()
            for M, us in by_rows.items()
        ),
        Claim("most rows for which cuda fused beats decode, 4096 x 4096", _crossover_model(gpu), _crossover),
        *(
            [Claim("rows for which cuda wgmma is the fastest path, 4096 x 4096", _wgmma_rows_model(gpu), _wgmma_rows)]
            if "wgmma" in kernel_us
            else []
        ),
        Claim(
            "training, LoRA in the op / LoRA beside the 4-bit layer, tokens/s",
            f"{ratios['bitsandbytes + PEFT'] / ratios['by parts']:.2f} (linears alone, M=4096)",
            _training_ratio,
        ),
        *(
            Claim(f"{backend}: host us of a LoRA layer, forward, M=64", "below 40", _host(backend))
            for backend in ("cuda", "triton")
        ),
        Claim("PagedAdamW equals the CPU bit for bit", "yes", _paging),
        Claim("Triton kernels compiled during the check, beside those of its cache", "0", _compiled),
    ]


def summary(rows: list[Row], capability: int) -> str:
    """Return one line of text for each claim."""
    lines = ["claim | predicted | measured"]
    for claim in claims(capability):
        measured = claim.measured(rows)
        lines.append(f"{claim.text} | {claim.predicted} | {'not measured' if measured is None else measured}")
    return "\n".join(lines) + "\n"


def _all_ok(backend: str) -> Callable[[list[Row]], str | None]:
    def measured(rows: list[Row]) -> str | None:
        verdicts = [row["ok"] for row in rows if row.get("backend") == backend and "ok" in row]
        return f"{sum(verdicts)} of {len(verdicts)}" if verdicts else None

    return measured


def _of_square(rows: list[Row], path: str) -> Iterable[Row]:
    return (
        row
        for row in rows
        if row.get("backend") == "cuda" and row.get("path") == path and row.get("N") == row.get("K") == 4096
    )


def _kernel(path: str, M: int) -> Callable[[list[Row]], str | None]:
    def measured(rows: list[Row]) -> str | None:
        return next((f"{row['us']:.1f}" for row in _of_square(rows, path) if row["M"] == M), None)

    return measured


def _crossover(rows: list[Row]) -> str | None:
    fused = {row["M"]: row["us"] for row in _of_square(rows, "fused")}
    decode = {row["M"]: row["us"] for row in _of_square(rows, "decode")}
    both = sorted(fused.keys() & decode.keys())
    if not both:
        return None
    return str(max((M for M in both if fused[M] < decode[M]), default=0))


def _crossover_model(gpu: roofline.GPU) -> str:
    wins = [M for M in range(64, 4097, 64) if roofline.fused_us(gpu, M) < roofline.decoded_us(gpu, M)]
    return str(max(wins, default=0))


def _wgmma_rows(rows: list[Row]) -> str | None:
    by_path = {
        path: {row["M"]: row["us"] for row in _of_square(rows, path)}
        for path in ("wgmma", "pairs", "small_m", "fused", "decode")
    }
    wgmma = by_path.pop("wgmma")
    others = {M: min((us[M] for us in by_path.values() if M in us), default=0.0) for M in wgmma}
    return _listed([M for M in wgmma if wgmma[M] < others[M]]) if wgmma else None


def _wgmma_rows_model(gpu: roofline.GPU) -> str:
    def others(M: int) -> float:
        few = [roofline.pairs_us(gpu, M)] if max(roofline.PAIRS) >= M else []
        few += [roofline.small_m_us(gpu, M)] if max(roofline.SMALL_M) >= M else []
        return min(roofline.fused_us(gpu, M), roofline.decoded_us(gpu, M), *few)

    return _listed([M for M in ROWS if M <= roofline.WGMMA_MOST_ROWS and roofline.wgmma_us(gpu, M) < others(M)])


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _training_ratio(rows: list[Row]) -> str | None:
    found = {
        row["way"]: row["tokens_per_s"] for row in rows if row.get("step") == "training" and row.get("dropout") == 0
    }
    return f"{found['fused op'] / found['by parts']:.2f}" if {"fused op", "by parts"} <= found.keys() else None


def _host(backend: str) -> Callable[[list[Row]], str | None]:
    def measured(rows: list[Row]) -> str | None:
        wanted = {"step": "host", "backend": backend, "call": "lora forward", "M": 64}
        return next((f"{row['us']:.1f}" for row in rows if wanted.items() <= row.items()), None)

    return measured


def _paging(rows: list[Row]) -> str | None:
    verdicts = [row["ok"] for row in rows if row.get("step") == "paging" and "ok" in row]
    return ("yes" if all(verdicts) else "no") if verdicts else None


def _compiled(rows: list[Row]) -> str | None:
    return next((str(row["compiled"]) for row in rows if row.get("step") == "cache"), None)
