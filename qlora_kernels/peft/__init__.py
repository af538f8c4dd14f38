"""Every PEFT method in plain PyTorch, over nn.Linear and LinearNF4 alike. docs/methods.md teaches each."""

from .adalora import AdaLoraConfig, adalora_ranks
from .config import PeftConfig
from .lora import LoraConfig
from .lora_plus import lora_plus_groups
from .peft_model import PeftModel, get_peft_model
from .prepare import prepare_for_training
from .registry import register_method

__all__ = [
    "AdaLoraConfig",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "adalora_ranks",
    "get_peft_model",
    "lora_plus_groups",
    "prepare_for_training",
    "register_method",
]
