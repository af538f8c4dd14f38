"""The names that `import qlora_kernels` offers. Importing them imports torch and registers the ops."""

from __future__ import annotations

from . import backends as _backends_package  # noqa: F401, first: loaded later it would shadow the function backends()
from . import peft
from .distributed import make_shardable
from .format.quant_state import QuantState
from .integrations import from_bnb, to_bnb
from .nn.convert import ReplaceReport, replace_experts, replace_linear
from .nn.experts_nf4 import ExpertsNF4
from .nn.fuse_model import FuseReport, fuse_model, unfuse_model
from .nn.linear_nf4 import LinearNF4
from .nn.merge_on_decode import set_merge_on_decode
from .ops.attention import attention
from .ops.dequantize_nf4 import dequantize_nf4
from .ops.glu import glu
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.linear_nf4 import linear_nf4
from .ops.linear_nf4_lora import linear_nf4_lora
from .ops.linear_nf4_lora_group import linear_nf4_lora_group
from .ops.linear_nf4_multi_lora import linear_nf4_multi_lora
from .ops.quantize_nf4 import quantize_nf4
from .ops.registry import backends, use_backend
from .ops.rms_norm import rms_norm
from .ops.rope import rope
from .optim import PagedAdamW, PagedAdamW8bit
from .peft.layers.fused_projections import fuse_shared_input, unfuse_shared_input
from .peft.model.lora_plus import lora_plus_groups
from .peft.model.prepare import prepare_for_training

__all__ = [
    "ExpertsNF4",
    "FuseReport",
    "LinearNF4",
    "PagedAdamW",
    "PagedAdamW8bit",
    "QuantState",
    "ReplaceReport",
    "attention",
    "backends",
    "dequantize_nf4",
    "from_bnb",
    "fuse_model",
    "fuse_shared_input",
    "glu",
    "linear_cross_entropy",
    "linear_nf4",
    "linear_nf4_lora",
    "linear_nf4_lora_group",
    "linear_nf4_multi_lora",
    "lora_plus_groups",
    "make_shardable",
    "peft",
    "prepare_for_training",
    "quantize_nf4",
    "replace_experts",
    "replace_linear",
    "rms_norm",
    "rope",
    "set_merge_on_decode",
    "to_bnb",
    "unfuse_model",
    "unfuse_shared_input",
    "use_backend",
]
