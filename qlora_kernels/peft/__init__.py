"""Every PEFT method in plain PyTorch, over nn.Linear and LinearNF4 alike. docs/methods.md describes each."""

from typing import Any

from .core.config import PeftConfig
from .framework.registry import METHODS, register_method
from .methods.adalora import AdaLoraConfig
from .methods.adapter import AdapterConfig
from .methods.adapter_fusion import AdapterFusionConfig
from .methods.bitfit import BitFitConfig
from .methods.boft import BOFTConfig
from .methods.full_ft import FullFTConfig
from .methods.ia3 import IA3Config
from .methods.loha import LoHaConfig
from .methods.lokr import LoKrConfig
from .methods.lora_config import LoraConfig
from .methods.mam import MAMConfig
from .methods.oft import OFTConfig
from .methods.p_tuning import PTuningConfig
from .methods.prefix_tuning import PrefixTuningConfig, PTuningV2Config
from .methods.prompt_tuning import PromptTuningConfig
from .methods.trainable_tokens import TrainableTokensConfig
from .methods.unipelt import UniPELTConfig
from .methods.vera import VeraConfig
from .model.adalora_ranks import adalora_ranks
from .model.eva import initialize_eva
from .model.lora_plus import lora_plus_groups
from .model.peft_model import PeftModel, get_peft_model
from .model.prepare import prepare_for_training

__all__ = [
    "METHODS",
    "AdaLoraConfig",
    "AdapterConfig",
    "AdapterFusionConfig",
    "BOFTConfig",
    "BitFitConfig",
    "FullFTConfig",
    "IA3Config",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "MAMConfig",
    "OFTConfig",
    "PTuningConfig",
    "PTuningV2Config",
    "PeftConfig",
    "PeftModel",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "TrainableTokensConfig",
    "UniPELTConfig",
    "VeraConfig",
    "adalora_ranks",
    "get_peft_model",
    "initialize_eva",
    "lora_plus_groups",
    "prepare_for_training",
    "register_method",
]

_INSTEAD = {
    "AutoPeftModelForCausalLM": "load the base model, then PeftModel.from_pretrained(model, folder)",
    "EvaConfig": "use initialize_eva",
    "LoftQConfig": 'use LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_iter": 1})',
    "PeftModelForCausalLM": "use PeftModel, which serves models of all tasks",
    "PeftModelForSequenceClassification": "use PeftModel, which serves models of all tasks",
    "PromptEncoderConfig": "use PTuningConfig",
    "TaskType": 'use names, as in task_type="CAUSAL_LM"',
    "get_layer_status": "use model.explain()",
    "get_model_status": "use model.explain()",
    "get_peft_model_state_dict": "use model.save_pretrained(folder), or model.adapters[name].named_parameters()",
    "prepare_model_for_kbit_training": "use prepare_for_training",
    "set_peft_model_state_dict": "use model.load_adapter(folder, adapter_name)",
}
"""Names of Hugging Face PEFT that are not here, and what is used in their place."""


def __getattr__(name: str) -> Any:
    hint = f": {_INSTEAD[name]}" if name in _INSTEAD else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
