"""QLoRAKernelsConfig: the description of NF4 weights in a transformers model's config."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..format import bnb_layout, nf4
from ..format.quant_state import FLOAT_DTYPES
from ..nn.match import as_names
from ..ops.checks import check_blocksize

METHOD = "qlora_kernels"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


_INSTEAD = {
    "load_in_4bit": "leave it out, since the weights are always 4 bits",
    "load_in_8bit": "leave it out, since the weights are always 4 bits",
    "bnb_4bit_quant_type": "leave it out, since the type is always NF4",
    "bnb_4bit_use_double_quant": "use double_quant, which is True by default",
    "bnb_4bit_compute_dtype": "use compute_dtype",
    "bnb_4bit_quant_storage": "leave it out; make_shardable prepares the weights for FSDP",
    "llm_int8_skip_modules": "use skip_modules",
}
"""Arguments of transformers' BitsAndBytesConfig, and what is used in their place."""


class QLoRAKernelsConfig(QuantizationConfigMixin):
    """The argument `quantization_config` of transformers' from_pretrained that loads linear layers and experts in NF4.

    skip_modules: modules and parameters that stay dense, by name or ending of a name; all layers inside a skipped block
    stay dense. "lm_head", the default, means the output head, under any name, the last layer, and the heads of
    classifiers and of question answering. Weights that are tied to the embeddings, and those that the model keeps in
    float32, always stay dense. In a checkpoint that is quantized already, a layer is what its tensors are, unless
    skip_modules names it.
    blocksize: weights per scale.   double_quant: scales in 8 bits.
    compute_dtype: dtype of the products, or its name; None computes in the dtype of the activations.
    Raises ValueError or TypeError for invalid values, and TypeError for arguments of BitsAndBytesConfig, with the one
    to use instead.
    """

    def __init__(
        self,
        skip_modules: Iterable[str] | None = ("lm_head",),
        blocksize: int = nf4.DEFAULT_BLOCKSIZE,
        double_quant: bool = True,
        compute_dtype: torch.dtype | str | None = None,
        *,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            name = next(iter(unknown))
            advice = _INSTEAD.get(name, "the arguments are skip_modules, blocksize, double_quant and compute_dtype")
            raise TypeError(f"QLoRAKernelsConfig: {name} is not an argument; {advice}")
        if quant_method != METHOD:
            raise ValueError(f"QLoRAKernelsConfig: quant_method must be {METHOD!r}, got {quant_method!r}")
        check_blocksize("QLoRAKernelsConfig", blocksize)
        self.quant_method: Any = METHOD
        self.skip_modules = list(as_names(skip_modules))
        self.blocksize = blocksize
        self.double_quant = double_quant
        self.compute_dtype = _as_dtype(compute_dtype)
        self._storage: Literal["qlora_kernels", "bitsandbytes"] = "qlora_kernels"
        self._model_dtype = torch.float32

    @property
    def named_modules(self) -> list[str]:
        """The items of skip_modules without "lm_head", which stands for heads under any name."""
        return [name for name in self.skip_modules if name != "lm_head"]

    def to_dict(self) -> dict[str, Any]:
        """Return the object in config.json; a model that bitsandbytes can read has a BitsAndBytesConfig's values."""
        if self._storage == "bitsandbytes":
            compute_dtype = self.compute_dtype or self._model_dtype
            return bnb_layout.quantization_config(self.double_quant, compute_dtype, self.skip_modules)
        return {
            "quant_method": METHOD,
            "skip_modules": list(self.skip_modules),
            "blocksize": self.blocksize,
            "double_quant": self.double_quant,
            "compute_dtype": None if self.compute_dtype is None else str(self.compute_dtype).removeprefix("torch."),
        }


def _as_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    dtype = _DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if value is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"QLoRAKernelsConfig: compute_dtype must be one of {list(_DTYPES)} or None, got {value!r}")
    return dtype


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(QLoRAKernelsConfig)
