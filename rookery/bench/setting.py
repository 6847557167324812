"""What is measured: the model's sizes, the batch, the device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from rookery.config import rules
from rookery.errors import UserError
from rookery.i18n import _
from rookery.models import CLASSES, Model, ModelShape, create
from rookery.ops.backend import Call, Op
from rookery.ops.wkv6 import OP as WKV6
from rookery.ops.wkv7 import OP as WKV7
from rookery.train.precision import DTYPES

DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"n_layer": 6, "n_embd": 256, "vocab_size": 4096, "ctx_len": 256, "micro_bsz": 4, "precision": "fp32"},
    "cuda": {"n_layer": 12, "n_embd": 768, "vocab_size": 65536, "ctx_len": 512, "micro_bsz": 64, "precision": "bf16"},
}
"""Sizes by device: what a CPU measures in less than a minute, and RWKV's pretraining demo."""


@dataclass(frozen=True)
class Setting:
    """Sizes by the names of the configuration; `device` is cpu or cuda."""

    device: str
    threads: int
    version: str
    n_layer: int
    n_embd: int
    head_size: int
    vocab_size: int
    ctx_len: int
    micro_bsz: int
    precision: str
    kernel: str
    grad_cp: bool
    rounds: int

    @classmethod
    def of(cls, device: str, threads: int, **sizes: Any) -> Setting:
        """Sizes that are None or missing are the device's.

        Args:
            device: auto, cpu or cuda.
            threads: of the processor; 0 for as many as PyTorch takes.

        Raises:
            UserError: something is unknown, missing on this machine, or does not fit together.
        """
        if device not in ("auto", "cpu", "cuda"):
            raise UserError(_("{name} is none of {known}", name=device, known="auto, cpu, cuda"))
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError(_("PyTorch sees no GPU here: leave out --device cuda."))
        device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        if threads:
            torch.set_num_threads(threads)
        given = {name: value for name, value in sizes.items() if value is not None}
        common: dict[str, Any] = {"version": "x070", "head_size": 64, "kernel": "auto", "grad_cp": False, "rounds": 5}
        setting = cls(**common | DEFAULTS[device] | given, device=device, threads=torch.get_num_threads())
        for value, known in ((setting.version, CLASSES), (setting.precision, DTYPES)):
            if value not in known:
                raise UserError(_("{name} is none of {known}", name=value, known=", ".join(known)))
        if setting.n_embd % setting.head_size:
            raise UserError(
                _(
                    "n_embd {n_embd} is not a multiple of head_size {head_size}",
                    n_embd=setting.n_embd,
                    head_size=setting.head_size,
                )
            )
        try:
            setting.op.choose(Call(device, setting.dtype, setting.head_size), setting.kernel)
        except ValueError as error:
            raise UserError(str(error)) from error
        return setting

    @property
    def op(self) -> Op:
        """The recurrence; that of x060 serves x052 too."""
        return WKV7 if self.version == "x070" else WKV6

    @property
    def shape(self) -> ModelShape:
        ranks = rules.ranks(self.version, self.n_layer, self.n_embd)
        dim_ffn = rules.dim_ffn(self.version, self.n_embd)
        return ModelShape(
            self.version, self.n_layer, self.n_embd, self.vocab_size, self.head_size, self.n_embd, dim_ffn, ranks
        )

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.micro_bsz * self.ctx_len

    def report(self) -> dict[str, Any]:
        """The sizes for a record."""
        return asdict(self)


def random_model(shape: ModelShape, *, kernel: str = "auto") -> Model:
    """A model on the CPU whose every part does something and whose logits vary; always the same values."""
    model = create(shape, kernel=kernel)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and min(parameter.shape[-2:]) > 1 and "r_k" not in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            elif "ln" in name:
                parameter.fill_(name.endswith("weight"))
            else:
                parameter.uniform_(-0.5, 0.5, generator=generator)
    return model.eval()
