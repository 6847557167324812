"""What went wrong when loss or gradients are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from rookery.i18n import _
from rookery.train.loop import Batch, LossFunction, Step


def save_batch(step: Step, folder: Path, rank: int | None = None) -> Path:
    """Writes nan-batch-step-N.safetensors, or nan-batch-step-N-rank-R.safetensors of one of several ranks: for each
    forward pass i of the step `tokens.i` and `targets.i`, (B, T) int64, and, where sequences are packed in the rows,
    `lengths.i`, (S,) int64."""
    of_rank = "" if rank is None else f"-rank-{rank}"
    file = folder / f"nan-batch-step-{step.number}{of_rank}.safetensors"
    tensors: dict[str, Tensor] = {}
    for i, batch in enumerate(step.batches):
        named = {"tokens": batch.tokens, "targets": batch.targets, "lengths": batch.lengths}
        tensors |= {f"{name}.{i}": x.cpu().contiguous() for name, x in named.items() if x is not None}
    metadata = {
        "step": str(step.number),
        "first_sample": str(step.batches[0].first_sample),
        "loss": str(step.loss.item()),
        "grad_norm": str(step.grad_norm.item()),
        "lr": str(step.rates.lr),
    }
    save_file(tensors, file, metadata=metadata)
    return file


def first_bad_tensor(model: nn.Module, loss_function: LossFunction, batches: Sequence[Batch]) -> str:
    """Repeats the step and names the first tensor that holds NaN or Inf: a parameter, an activation or a gradient."""
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return _("parameter {name}", name=name)
    for batch in batches:
        bad = _bad_activation(model, loss_function, batch)
        if bad is not None:
            return _("activation {name}", name=bad)
        bad_gradients = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
        if bad_gradients:
            # Gradients go from the head to the embedding: the last in the order of the model went bad first.
            return _("gradient of {name}", name=bad_gradients[-1])
    return _("none: the same batch is finite when it is repeated")


def _bad_activation(model: nn.Module, loss_function: LossFunction, batch: Batch) -> str | None:
    """Runs forward and backward, and names the first module whose output is not finite."""
    bad: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if not all(_finite(tensor) for tensor in outputs if isinstance(tensor, Tensor)):
                bad.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        model.zero_grad(set_to_none=True)
        for part in loss_function(model, batch):
            if not bad and not _finite(part.loss):
                bad.append("loss")
            if bad:
                break
            if part.loss.requires_grad:
                part.loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return bad[0] if bad else None


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())
