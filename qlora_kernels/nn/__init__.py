"""What users hold: drop-in linear layers in NF4 and the replacement of existing ones."""

from .convert import ReplaceReport, replace_experts, replace_linear
from .experts_nf4 import ExpertsNF4
from .linear_nf4 import LinearNF4

__all__ = ["ExpertsNF4", "LinearNF4", "ReplaceReport", "replace_experts", "replace_linear"]
