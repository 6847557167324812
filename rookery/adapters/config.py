"""What an adapter is: its method, its size, and which parameters of a model it concerns."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from rookery.config.tree import AdapterSection
from rookery.errors import UserError
from rookery.i18n import _

Method = Literal["lora", "dora", "pissa", "miss"]
MissMode = Literal["bone", "bat", "bat_rows"]
Part = Literal["time", "ln", "emb", "head"]

_PARTS = {
    "time": re.compile(r"^blocks\.\d+\.(att|ffn|ffnPre)\.(?!time_state$)[^.]+$"),
    "ln": re.compile(r"(^|\.)(ln_?\w*|tiny_ln)\.(weight|bias)$"),
    "emb": re.compile(r"^emb\.weight$"),
    "head": re.compile(r"^head\.weight$"),
}
"""Part -> names of its parameters. `time` is what time and channel mixing hold beside matrices and normalisations: in
x052 and x060 exactly the names with `time` in them, as RWKV-PEFT selects; in x070, whose names have no `time` (so that
RWKV-PEFT selects nothing there), the parameters of the same role: x_*, w*, a*, v*, g*, k_k, k_a, r_k."""


@dataclass(frozen=True)
class AdapterConfig:
    """Everything that fixes the names, shapes and meaning of an adapter's tensors."""

    method: Method = "lora"
    r: int = 64
    """Rank; of miss, the side of a block."""
    alpha: float = 192.0
    """Strength of lora and dora. pissa and miss have none."""
    dropout: float = 0.0
    """Part of the input that lora and dora drop in training. pissa and miss drop nothing."""
    rslora: bool = False
    """Strength alpha / sqrt(r) in place of alpha / r."""
    targets: tuple[str, ...] | None = None
    """Matrices: "key" (of att and ffn), "att.key", "att" (all of it), "blocks.3.att.key"; None = all of the blocks."""
    train_parts: tuple[str, ...] = ()
    """Base parameters that train as well: time, ln, emb, head."""
    miss_mode: MissMode = "bone"
    """bone: W_ab + D (every block the same D); bat: W_ab + W_ab D_b + D_b, by columns of blocks, as RWKV-PEFT has it;
    bat_rows: W_ab + W_ab D_a + D_a, by rows of blocks, as Hugging Face peft has it."""
    svd_niter: int = 4
    """Power iterations of the randomised SVD that pissa begins with."""

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: a value that makes no sense.
        """
        for value, known, what in (
            (self.method, get_args(Method), "method"),
            (self.miss_mode, get_args(MissMode), "miss_mode"),
            *((part, get_args(Part), "train_parts") for part in self.train_parts),
        ):
            if value not in known:
                raise UserError(
                    _("{what}: {value} is not one of {known}", what=what, value=value, known=", ".join(known))
                )
        if self.r < 1 or not math.isfinite(self.alpha) or not 0 <= self.dropout < 1:
            raise UserError(
                _(
                    "an adapter of rank {r}, alpha {alpha}, dropout {dropout} is impossible: the rank is at least 1, "
                    "the dropout below 1",
                    r=self.r,
                    alpha=self.alpha,
                    dropout=self.dropout,
                )
            )

    @classmethod
    def of_section(cls, section: AdapterSection) -> AdapterConfig:
        """What the settings of a run ask for; `peft` is an adapter's method."""
        plain = section.peft in ("pissa", "miss")
        return cls(
            method=section.peft,  # type: ignore[arg-type]  # `none` and `state` are refused above
            r=section.lora_r,
            alpha=float(section.lora_r) if plain else section.lora_alpha,
            dropout=0.0 if plain else section.lora_dropout,
            rslora=section.rslora and not plain,
            targets=tuple(section.target_modules) if section.target_modules else None,
            train_parts=tuple(section.train_parts),
            miss_mode=section.miss_mode,
            svd_niter=section.svd_niter,
        )

    @property
    def scale(self) -> float:
        """What the product of lora and dora counts."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


def in_parts(parameter: str, parts: tuple[str, ...]) -> bool:
    """Whether a base parameter of this name belongs to one of the parts."""
    return any(_PARTS[part].search(parameter) for part in parts)
