"""Which adapted layers run in one fused call, and the reasons for the others."""

from __future__ import annotations

from ..framework.injector import Injector


class Explanation(dict[str, str]):
    """A mapping from layer name to "fused" or the reason why it is not fused; str() gives one line for each distinct
    value.
    """

    def __str__(self) -> str:
        layers: dict[str, list[str]] = {}
        for name, answer in self.items():
            layers.setdefault(answer, []).append(name)
        return "\n".join(f"{len(names):4d} layers  {answer}  ({names[0]}, ...)" for answer, names in layers.items())


def explain(injector: Injector) -> Explanation:
    """Return for each adapted layer "fused" or the reason why it is not."""
    return Explanation(
        {name: layer.fusion_unsupported() or "fused" for name, layer in injector.adapted_layers().items()}
    )
