"""transformers' Trainer and TRL: a callback for PEFT methods with a schedule and a loss of their own."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..peft import PeftModel


class PeftCallback(TrainerCallback):
    """Runs AdaLoRA's schedule and its regularizer in a Trainer: `Trainer(..., callbacks=[PeftCallback()])`.

    Each optimizer step begins with the gradient of `model.peft_loss()`, to which the batches add theirs: their sum is
    what is clipped, and the loss that is logged is the task's alone. After the optimizer's step, the callback calls
    `model.step(state.global_step)`. Methods without a schedule are not changed by it.
    """

    def on_step_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Add the gradient of the auxiliary loss, multiplied as GradScaler multiplies the losses of the batches."""
        adapted = _peft_model(model)
        adapted.train()  # an evaluation may have come before; in eval mode the auxiliary loss is zero
        loss = adapted.peft_loss()
        scaler = getattr(optimizer, "scaler", None)
        if loss.requires_grad:
            (loss if scaler is None else loss * scaler.get_scale()).backward()

    def on_optimizer_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Advance the schedule while the gradients of the step are still there."""
        adapted = _peft_model(model)
        if getattr(optimizer, "step_was_skipped", False):  # by GradScaler, because some gradients are not finite
            for parameter in adapted.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
        adapted.step(state.global_step)


def _peft_model(model: nn.Module) -> PeftModel:
    found = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if found is None:
        raise TypeError(
            f"PeftCallback: the Trainer's model must be a qlora_kernels.peft.PeftModel, got {type(model).__name__}; "
            "use get_peft_model of qlora_kernels.peft"
        )
    return found
