"""transformers: NF4 in from_pretrained and save_pretrained, and causal language models from local folders.

Importing this module registers `QLoRAKernelsConfig` with transformers, which its quantized models need to load:

    from qlora_kernels.integrations.transformers import QLoRAKernelsConfig
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=QLoRAKernelsConfig())
"""

from .model_folders import (
    BUILTIN_PACKAGE,
    ModelError,
    as_model_error,
    convert_gguf,
    is_quantized,
    linear_layers,
    load_model,
    load_tokenizer,
    model_outline,
    quantize_model,
    resolve_model,
)
from .quantization_config import QLoRAKernelsConfig
from .quantizer import QLoRAKernelsQuantizer

__all__ = [
    "BUILTIN_PACKAGE",
    "ModelError",
    "QLoRAKernelsConfig",
    "QLoRAKernelsQuantizer",
    "as_model_error",
    "convert_gguf",
    "is_quantized",
    "linear_layers",
    "load_model",
    "load_tokenizer",
    "model_outline",
    "quantize_model",
    "resolve_model",
]
