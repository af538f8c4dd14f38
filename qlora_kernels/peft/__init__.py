"""Every PEFT method in plain PyTorch, over nn.Linear and LinearNF4 alike. docs/methods.md teaches each."""

from .adalora import AdaLoraConfig, adalora_ranks
from .adapter import AdapterConfig
from .adapter_fusion import AdapterFusionConfig
from .bitfit import BitFitConfig
from .config import PeftConfig
from .eva import initialize_eva
from .full_ft import FullFTConfig
from .lora import LoraConfig
from .lora_plus import lora_plus_groups
from .mam import MAMConfig
from .p_tuning import PTuningConfig
from .peft_model import PeftModel, get_peft_model
from .prefix_tuning import PrefixTuningConfig, PTuningV2Config
from .prepare import prepare_for_training
from .prompt_tuning import PromptTuningConfig
from .registry import METHODS, register_method
from .unipelt import UniPELTConfig

__all__ = [
    "METHODS",
    "AdaLoraConfig",
    "AdapterConfig",
    "AdapterFusionConfig",
    "BitFitConfig",
    "FullFTConfig",
    "LoraConfig",
    "MAMConfig",
    "PTuningConfig",
    "PTuningV2Config",
    "PeftConfig",
    "PeftModel",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "UniPELTConfig",
    "adalora_ranks",
    "get_peft_model",
    "initialize_eva",
    "lora_plus_groups",
    "prepare_for_training",
    "register_method",
]
