"""Drop-in linear layers in NF4, conversion of existing models, and fused forwards of transformers' modules."""

from .convert import ReplaceReport, replace_experts, replace_linear
from .experts_nf4 import ExpertsNF4
from .fuse_model import FuseReport, fuse_model, unfuse_model
from .linear_nf4 import LinearNF4

__all__ = [
    "ExpertsNF4",
    "FuseReport",
    "LinearNF4",
    "ReplaceReport",
    "fuse_model",
    "replace_experts",
    "replace_linear",
    "unfuse_model",
]
