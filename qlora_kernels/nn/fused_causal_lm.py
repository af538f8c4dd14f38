"""Causal language models of transformers whose output head and loss run as one op, without the logits in memory.

The logits of a training batch take more memory than the activations of a small model, and a training step needs only
the loss. The fused forward therefore returns `logits=None` if `skip_logits` is True. The default is True in training
mode with labels and False otherwise, which is the convention of the Liger kernels and supported by
`transformers.Trainer`. Evaluation and generation keep their logits.
"""

from __future__ import annotations

from functools import update_wrapper
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from .fused_module import FusedModule
from .head_loss import head_loss, serves_head
from .known_forms import form_of, unwrapped_function

_HANDLED = ("transformers.utils.generic",)
"""Modules of the decorator can_return_tuple; the original forward handles calls that return a tuple."""

FORMS: dict[str | None, str | None] = {
    "40c9f1ac6268f19d": None,  # Llama, Qwen2, Qwen3, Mistral, Gemma, SmolLM3
    "947b08152cac72d7": "final_logit_softcapping",  # Gemma 2 and 3
}
"""Digest of a forward in transformers 5.24 -> the config attribute with the softcap of the logits, or None."""

_LOSS = {"ForCausalLMLoss": "2f752581688c701a", "fixed_cross_entropy": "7679417dd15aaeff"}
"""Loss functions -> digests of their code."""

_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds")
"""Names of the original forward's positional arguments before labels."""

_NOT_OF_THE_DECODER = ("labels", "logits_to_keep", "return_dict", "past_key_values")


def causal_lm_form(kind: Any) -> str | None:
    """Return the digest of a model class's forward if it is one of FORMS, otherwise None."""
    form = form_of(kind.forward, _HANDLED)
    return form if form in FORMS else None


class FusedCausalLM(FusedModule):
    """A decoder with an output head whose loss is computed by linear_cross_entropy."""

    softcap_name: ClassVar[str | None]
    output_class: ClassVar[Any]
    model: nn.Module
    lm_head: nn.Module
    config: Any
    loss_function: Any

    @classmethod
    def members_for(cls, base: type[nn.Module]) -> dict[str, Any]:
        original: Any = base.forward
        output_class = unwrapped_function(original, _HANDLED).__globals__["CausalLMOutputWithPast"]

        def forward(self: FusedCausalLM, *args: Any, **kwargs: Any) -> Any:
            return self.forward_fused(*args, **kwargs)

        # Trainer and generate() read the names of the arguments from the signature.
        update_wrapper(forward, original)
        softcap_name = FORMS[causal_lm_form(base)]
        return {"forward": forward, "output_class": output_class, "softcap_name": softcap_name}

    def forward_fused(self, *args: Any, skip_logits: bool | None = None, **kwargs: Any) -> Any:
        """Run the original forward; if logits are skipped, compute the loss with the op."""
        labels = kwargs.get("labels")
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        if self.training and labels is not None and _reads_no_cache(args, kwargs):
            # A training step reads no keys and values again, and attention that stores them runs op by op.
            kwargs.setdefault("use_cache", False)
        if not skip_logits or not self._serves_call(args, kwargs):
            return super().forward(*args, **kwargs)
        given = {name: value for name, value in kwargs.items() if name not in _NOT_OF_THE_DECODER}
        outputs = self.model(**dict(zip(_ARGUMENTS, args, strict=False)), **given)
        return self.output_class(
            loss=self._loss(outputs.last_hidden_state, cast(Tensor, labels), kwargs),
            logits=None,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, hidden: Tensor, labels: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Compute the loss as transformers' ForCausalLMLoss does; labels are shifted unless shift_labels is given."""
        ignored = kwargs.get("ignore_index", -100)
        shifted = kwargs.get("shift_labels")
        if shifted is None:
            shifted = F.pad(labels, (0, 1), value=ignored)[..., 1:]
        return head_loss(
            self.lm_head,
            hidden,
            shifted.to(hidden.device).view(hidden.shape[:-1]),
            ignore_index=ignored,
            softcap=getattr(self.config, self.softcap_name) if self.softcap_name else None,
            num_items_in_batch=kwargs.get("num_items_in_batch"),
        )

    def _serves_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        logits_to_keep = kwargs.get("logits_to_keep", 0)
        return (
            len(args) <= len(_ARGUMENTS)
            and isinstance(kwargs.get("labels"), Tensor)
            and isinstance(logits_to_keep, int)
            and logits_to_keep == 0
            and kwargs.get("return_dict") is not False
            and getattr(self.config, "return_dict", True)
            and "past_key_values" not in kwargs
            and _is_known_loss(self.loss_function)
            and serves_head(self.lm_head, self.config.vocab_size)
        )


def _reads_no_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call has neither a cache nor position ids, which transformers takes for packed rows only without a
    cache.
    """
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    return all(given.get(name) is None for name in ("cache", "past_key_values", "position_ids"))


def _is_known_loss(function: Any) -> bool:
    names = getattr(function, "__globals__", {})
    return getattr(function, "__name__", None) == "ForCausalLMLoss" and all(
        callable(names.get(name)) and form_of(names[name]) == form for name, form in _LOSS.items()
    )
