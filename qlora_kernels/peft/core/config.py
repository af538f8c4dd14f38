"""PeftConfig: the base of all configurations, which are frozen dataclasses of plain values, as in PEFT's JSON files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...nn.match import as_names
from .field_types import check_field_types

if TYPE_CHECKING:
    from typing_extensions import Self

# Heads that PEFT trains and saves by default, by task.
TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}

TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", *TASK_HEADS)

# Fields that determine the sizes of allocated tensors.
SIZES = (
    "r",
    "lora_r",
    "init_r",
    "num_virtual_tokens",
    "bottleneck_size",
    "encoder_hidden_size",
    "prefix_length",
    "prefix_hidden_size",
)

# Keys that PEFT writes in addition to a method's own fields and that do not change the computed function. The last
# three describe how training started.
_BOOKKEEPING = {"peft_type", "peft_version", "auto_mapping", "megatron_core", "qalora_group_size"}
_BOOKKEEPING |= {"eva_config", "corda_config", "lora_ga_config"}


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """Fields of every method. `modules_to_save`: name suffixes of modules trained in full, e.g. a new head.

    Raises ValueError for a field whose value does not have the annotated type.
    """

    peft_type: ClassVar[str]
    own_fields: ClassVar[tuple[str, ...]] = ()  # fields that PEFT's files of this type do not have

    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    modules_to_save: list[str] | tuple[str, ...] | str | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise ValueError(
                f"{type(self).__name__}: task_type must be one of {list(TASK_TYPES)} or None, got {self.task_type!r}"
            )
        if isinstance(self.modules_to_save, str):  # one name; PEFT's file has a list
            object.__setattr__(self, "modules_to_save", (self.modules_to_save,))

    @property
    def heads(self) -> tuple[str, ...]:
        """`modules_to_save` and the names of the task's head."""
        return tuple(dict.fromkeys((*as_names(self.modules_to_save), *TASK_HEADS.get(self.task_type or "", ()))))

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values of the given fields."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return {
            "peft_type": self.peft_type,
            **{f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the configuration in a file or of PEFT; null means the field's default.

        Raises NotImplementedError for a key that this method does not have, unless its value is null, false or empty:
        without the key, the adapter would compute another function than intended.
        """
        fields = {f.name for f in dataclasses.fields(cls)}
        unknown = {k: v for k, v in values.items() if k not in fields and k not in _BOOKKEEPING and v}
        if unknown:
            raise NotImplementedError(
                f"{cls.__name__}: the configuration must have fields of this method alone, got {unknown}; load "
                "the adapter with the package that wrote it, or set these fields to null if they have no effect"
            )
        given = {k: v for k, v in values.items() if k in fields and v is not None}
        required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
        if missing := sorted(required - given.keys()):
            raise ValueError(f"{cls.__name__}: the file must give {missing}, got none; save the adapter again")
        return cls(**given)


def _plain(value: Any) -> Any:
    """Return `value` with tuples and sets as lists, for JSON."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value
