"""AdaLoRA: y = W x + (lora_alpha / init_r) * B diag(E) A dropout(x), with ranks that are reallocated between layers
during training.

Source: AdaLoRA (arXiv:2303.10512) and its authors' code. Names, defaults and files: PEFT's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import ref

import torch
from torch import Tensor, nn

from ...nn.module_tree import has_hooks
from ...nn.quantized_weight import cut_as, is_sharded
from ..core.config import PeftConfig
from ..core.offloaded import weight_of
from ..core.sharded import full_tensor
from ..framework.injector import Injector
from ..framework.linear_method import LinearMethod
from ..framework.method import FILE_PREFIX
from ..framework.registry import register_method
from ..framework.targets import check_pattern_names, matched_layers
from ..layers.base_layer import device_of, features
from ..layers.delta import Delta
from ..layers.lowrank import add_lowrank
from .rank_allocator import TRIPLET_DIM, BudgetSchedule, RankAllocator, Triplets

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(PeftConfig):
    """Configuration of AdaLoRA, with the fields, names and defaults of PEFT's AdaLoraConfig that PEFT uses.

    Every layer starts with rank init_r. After total_step calls of step() the mean rank is target_r. No triplet is
    pruned in the first tinit steps, ranks are final in the last tfinal steps, and in between they change at every
    deltaT-th step.
    beta1, beta2: decay of the running averages of sensitivity and uncertainty. orth_reg_weight: factor of peft_loss().
    orth_reg_squared: True sums the squared norms over the layers, as equation (4) of the paper; False averages the
    norms, as the authors' code and PEFT. The published weights (0.1, 0.3, 0.5) are for the latter.
    init_lora_weights: True (E zero, A and B normal of std 0.02: identity) or False (all standard normal).
    rank_pattern: {"<layer>.lora_E": [whether each of the init_r triplets is kept]}, written on save.
    Raises ValueError, naming the field, for a rank, step, coefficient or bias outside its range.
    """

    peft_type = "ADALORA"

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    orth_reg_squared: bool = False
    total_step: int
    rank_pattern: dict[str, list[bool]] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    exclude_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    layers_to_transform: list[int] | tuple[int, ...] | int | None = None
    layers_pattern: list[str] | tuple[str, ...] | str | None = None
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool = True

    own_fields: ClassVar[tuple[str, ...]] = ("orth_reg_squared",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, holds, rule in (
            ("target_r", 1 <= self.target_r <= self.init_r, f"lie between 1 and init_r={self.init_r}"),
            ("tfinal", 0 <= self.tfinal < self.total_step, f"be >= 0 and below total_step={self.total_step}"),
            ("tinit", 0 <= self.tinit < self.last_allocation, f"be >= 0 and below {self.last_allocation}"),
            ("deltaT", self.deltaT >= 1, "be >= 1"),
            ("beta1", 0 < self.beta1 < 1, "lie between 0 and 1"),
            ("beta2", 0 < self.beta2 < 1, "lie between 0 and 1"),
            ("orth_reg_weight", self.orth_reg_weight >= 0, "be >= 0"),
            ("lora_alpha", self.lora_alpha > 0, "be > 0"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "be in [0, 1)"),
            ("bias", self.bias in ("none", "all", "lora_only"), "be 'none', 'all' or 'lora_only'"),
        ):
            if not holds:
                raise ValueError(f"AdaLoraConfig: {field} must {rule}, got {getattr(self, field)!r}")

    @property
    def last_allocation(self) -> int:
        """Number of the first step with final ranks."""
        return self.total_step - self.tfinal

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        # PEFT also writes LoRA's `r`, which it ignores.
        return super().from_dict({key: value for key, value in values.items() if key != "r"})


class SvdLinear(Delta):
    """Update scaling * B diag(E) A with the parameters lora_A [r, K], lora_E [r, 1] and lora_B [N, r].

    `kept` bool [r]: the triplets of the last allocation. `rows` int64: the triplets of the final allocation, None
    before it. Once `rows` is set, forward uses only these rows of A, E and B.
    """

    kept: Tensor
    rows: Tensor | None

    def __init__(self, base: nn.Module, r: int, scaling: float, config: AdaLoraConfig, dtype: torch.dtype) -> None:
        super().__init__()
        k, n = features(base)
        device = device_of(base)
        self.scaling, self.dropout_p = scaling, config.lora_dropout
        std = 0.02 if config.init_lora_weights else 1.0
        self.lora_A = nn.Parameter(std * torch.randn(r, k, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(std * torch.randn(n, r, device=device, dtype=dtype))
        E = torch.zeros if config.init_lora_weights else torch.randn
        self.lora_E = nn.Parameter(E(r, 1, device=device, dtype=dtype))
        self.register_buffer("kept", torch.ones(r, dtype=torch.bool, device=device), persistent=False)
        self.register_buffer("rows", None, persistent=False)

    @property
    def triplets(self) -> Triplets:
        """The parameters (lora_A, lora_E, lora_B) of all triplets."""
        return self.lora_A, self.lora_E, self.lora_B

    def resize(self, r: int) -> None:
        """Make room for r triplets, all of them kept; where their number changes, they are zero."""
        for parameter, dim in zip(self.triplets, TRIPLET_DIM.values(), strict=True):
            if parameter.shape[dim] != r:
                shape = list(parameter.shape)
                shape[dim] = r
                parameter.data = parameter.new_zeros(shape)
        self.kept, self.rows = self.kept.new_ones(r), None

    def freeze_rank(self) -> None:
        """Make `kept` final. A layer without kept triplets computes with one masked row, because kernels need a rank of
        at least one.
        """
        self.rows = self.kept.nonzero().flatten()
        if len(self.kept) and not len(self.rows):
            self.rows = self.rows.new_zeros(1)

    def live(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A, E and B of the triplets that forward uses. Sharded parameters are gathered."""
        lora_A, lora_E, lora_B = (full_tensor(weight_of(self, name)) for name in TRIPLET_DIM)
        if self.rows is None:
            return lora_A, lora_E, lora_B
        return lora_A[self.rows], (lora_E * self.kept[:, None])[self.rows], lora_B[:, self.rows]

    def lowrank(self) -> tuple[Tensor, Tensor, float]:
        # E is multiplied into A's rows, so the fused LoRA op applies and autograd splits the gradient of E * A.
        lora_A, lora_E, lora_B = self.live()
        return lora_E * lora_A, lora_B, self.scaling

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return self.lowrank() if len(self.kept) and not has_hooks(self) else None

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor:
        if not len(self.kept):
            return y  # rank zero, out of a file
        return add_lowrank(x, y, [self.lowrank()], dropout_p=self.dropout_p if self.training else 0.0)

    def orthogonality(self) -> list[Tensor]:
        """Return ||A A^T - I||_F and ||B^T B - I||_F."""
        lora_A, _, lora_B = self.live()
        eye = torch.eye(len(lora_A), device=lora_A.device, dtype=lora_A.dtype)
        return [torch.linalg.matrix_norm(gram - eye) for gram in (lora_A @ lora_A.T, lora_B.T @ lora_B)]


class _NoteGradient:
    """Hook that records in a method that gradients exist, without keeping the method alive.

    The garbage collector does not follow references held by parameter hooks, so a strong reference would keep the whole
    model alive.
    """

    def __init__(self, method: AdaLora) -> None:
        self.method = ref(method)

    def __call__(self, parameter: Tensor) -> None:
        if (method := self.method()) is not None:
            method.missed_gradients = True


@register_method(AdaLoraConfig)
class AdaLora(LinearMethod[SvdLinear]):
    """AdaLoRA as a method of a PeftModel. The training loop adds model.peft_loss() to its loss and calls model.step(t)
    after backward and before zero_grad.
    """

    config: AdaLoraConfig
    rank_tensors: ClassVar[dict[str, int]] = {"lora_A": 0}
    trained_fields: ClassVar[frozenset[str]] = frozenset({"rank_pattern"})

    def __init__(self, config: AdaLoraConfig, injector: Injector, name: str) -> None:
        super().__init__(config, injector, name)
        deltas = self.deltas
        self.schedule = BudgetSchedule(
            start=config.init_r * len(deltas),
            end=config.target_r * len(deltas),
            tinit=config.tinit,
            last=config.last_allocation,
            deltaT=config.deltaT,
        )
        self.allocator = RankAllocator(self._triplets, config.beta1, config.beta2)
        self.last_step: int | None = None
        self.missed_gradients = False
        self.watch_training()

    def _triplets(self) -> list[Triplets]:
        return [delta.triplets for delta in self.deltas.values()]

    def watch_training(self) -> None:
        """Register hooks that record gradients, so that saving can detect that step() was not called."""
        for delta in self.deltas.values():
            hooks = getattr(delta.lora_E, "_post_accumulate_grad_hooks", None) or {}
            if not any(isinstance(hook, _NoteGradient) and hook.method() is self for hook in hooks.values()):
                delta.lora_E.register_post_accumulate_grad_hook(_NoteGradient(self))

    @classmethod
    def check_names(cls, config: PeftConfig, injector: Injector) -> None:
        super().check_names(config, injector)
        assert isinstance(config, AdaLoraConfig)
        if config.rank_pattern:
            targets = [f"{path}.lora_E" for path in matched_layers(injector, config)]
            check_pattern_names("rank_pattern", config.rank_pattern, targets)

    @classmethod
    def rank(cls, config: PeftConfig, path: str) -> int:
        assert isinstance(config, AdaLoraConfig)
        pattern = (config.rank_pattern or {}).get(f"{path}.lora_E")
        return config.init_r if pattern is None else sum(pattern)

    def new_delta(self, path: str, base: nn.Module) -> SvdLinear:
        config, r = self.config, self.rank(self.config, path)
        # The scale is that of the initial rank, also after pruning.
        return SvdLinear(base, r, config.lora_alpha / config.init_r, config, self.injector.adapter_dtype)

    # In training

    def peft_loss(self) -> Tensor:
        """Return orth_reg_weight times the mean of ||A A^T - I||_F and ||B^T B - I||_F over all layers, or times the
        sum of squares.

        Source: section 3.1, equation (4); the authors' code.
        """
        norms = torch.stack([norm for delta in self.deltas.values() for norm in delta.orthogonality()])
        return self.config.orth_reg_weight * (norms.square().sum() if self.config.orth_reg_squared else norms.mean())

    def step(self, global_step: int) -> None:
        """Update the importance scores and, at the steps of the schedule, reallocate the ranks.

        Raises RuntimeError if no parameter has a gradient.
        """
        if not self._is_final():
            final = global_step >= self.config.last_allocation
            if not final or not self.allocator.sensitivity:
                self.allocator.update()
            if self.schedule.allocates_at(global_step):
                self._allocate(self.schedule.budget(global_step), final)
        self.missed_gradients = False
        self.last_step = global_step

    def _is_final(self) -> bool:
        return any(delta.rows is not None for delta in self.deltas.values())

    def _allocate(self, budget: int, final: bool) -> None:
        for delta, kept in zip(self.deltas.values(), self.allocator.keep(budget), strict=True):
            delta.kept = kept
            if final:
                delta.freeze_rank()

    # In files

    def before_save(self) -> None:
        if self.missed_gradients:
            raise RuntimeError(
                "AdaLoRA: model.step(global_step) must be called after every backward, or ranks do not move; in "
                "transformers' Trainer, qlora_kernels.integrations.trainer.PeftCallback calls it; "
                f"its last call was {'none' if self.last_step is None else f'step({self.last_step})'}"
            )

    def file_config(self) -> dict[str, Any]:
        pattern = {f"{path}.lora_E": self._kept_of_initial(path) for path in self.deltas}
        pruned = not all(all(kept) for kept in pattern.values())
        return {**super().file_config(), "rank_pattern": pattern if pruned else None}

    def _kept_of_initial(self, path: str) -> list[bool]:
        """Return a mask of the init_r triplets that are kept. Triplets that the loaded file did not have are not
        kept.
        """
        kept: list[bool] = self.deltas[path].kept.tolist()
        loaded = (self.config.rank_pattern or {}).get(f"{path}.lora_E")
        if loaded is None:
            return kept
        still = iter(kept)
        return [present and next(still) for present in loaded]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the file, which holds the kept triplets only."""
        tensors = super().tensors()
        for path, delta in self.deltas.items():
            for leaf, dim in TRIPLET_DIM.items():
                key = f"{FILE_PREFIX}{path}.{leaf}"
                tensors[key] = tensors[key].index_select(dim, delta.kept.nonzero().flatten())
        return tensors

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load the tensors of a file, also of another time of the same run, when other triplets were kept."""
        for path, delta in self.deltas.items():
            delta.resize(self.rank(self.config, path))
        self.allocator.forget()
        self.last_step, self.missed_gradients = None, False
        super().load_tensors(tensors)

    def extras(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return all triplets and their importance before the end of training, because pruned triplets may be
        restored.
        """
        finished = self.last_step is not None and self.last_step >= self.config.total_step - 1
        return super().extras() if finished else self._unfinished()

    def training_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return all triplets, also at the end of training, so that runs can be compared and continued."""
        return self._unfinished()

    def load_training_state(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.load_extras(values, tensors, is_trainable=True)

    def _unfinished(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = super().extras()
        if self.last_step is None:
            return values, tensors
        values |= {"step": self.last_step, "final": self._is_final(), "rank_pattern": self.config.rank_pattern}
        tensors.update({f"{path}.kept": delta.kept for path, delta in self.deltas.items()})
        tensors.update(zip(self._weight_names(), self.allocator.weights, strict=True))
        for average in ("sensitivity", "uncertainty"):  # empty before the first update
            tensors.update(zip(self._weight_names(average), getattr(self.allocator, average), strict=False))
        return values, tensors

    def _weight_names(self, *of: str) -> list[str]:
        return [".".join((path, leaf, *of)) for path in self.deltas for leaf in TRIPLET_DIM]

    def load_extras(self, values: dict[str, Any], tensors: dict[str, Tensor], *, is_trainable: bool) -> None:
        if "step" not in values or not is_trainable:
            return
        self.last_step = values["step"]
        self.config = self.config.replace(rank_pattern=values["rank_pattern"])
        # Copies, because the tensors of a file have another alignment and the order of sums depends on the alignment.
        for average in ("sensitivity", "uncertainty"):
            getattr(self.allocator, average).clear()
        for name, weight in zip(self._weight_names(), self.allocator.weights, strict=True):
            if is_sharded(weight):
                weight.detach().copy_(cut_as(weight, full_tensor(tensors[name])))
            else:
                weight.data = tensors[name].to(weight, copy=True)
            for average in ("sensitivity", "uncertainty"):
                if f"{name}.{average}" in tensors:
                    saved = tensors[f"{name}.{average}"].to(weight.device, copy=True)
                    getattr(self.allocator, average).append(saved if is_sharded(saved) else cut_as(weight, saved))
        for path, delta in self.deltas.items():
            delta.kept = tensors[f"{path}.kept"].to(delta.kept.device)
            if values["final"]:
                delta.freeze_rank()
