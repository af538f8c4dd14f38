"""What users hold: drop-in linear layers in NF4 and the replacement of existing ones."""

from .convert import ReplaceReport, replace_linear
from .linear_nf4 import LinearNF4

__all__ = ["LinearNF4", "ReplaceReport", "replace_linear"]
