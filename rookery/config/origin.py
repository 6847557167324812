"""Where a value of the configuration came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rookery.config.tree import SECTION_OF, TrainConfig
from rookery.i18n import _

Kind = Literal["default", "flag", "toml", "caller", "rule", "checkpoint", "data", "device"]


@dataclass(frozen=True)
class Origin:
    """The origin of one value: its kind, and the flag, `file:line`, formula or file it came from."""

    kind: Kind
    detail: str = ""

    @property
    def given(self) -> bool:
        """Whether a person asked for the value, so that nothing may quietly replace it."""
        return self.kind in ("flag", "toml", "caller")

    def __str__(self) -> str:
        """For people: `--ctx_len`, `recipe.toml:12`, `rule: 0.45/n_embd`, `checkpoint: rwkv-init.pth` ..."""
        if self.kind == "default":
            return _("default")
        if self.kind == "caller":
            return _("given by the program")
        if self.kind == "rule":
            return _("rule: {formula}", formula=self.detail)
        if self.kind == "checkpoint":
            return _("checkpoint: {file}", file=self.detail)
        if self.kind == "data":
            return _("data: {file}", file=self.detail)
        if self.kind == "device":
            return _("this machine: {device}", device=self.detail)
        return self.detail


Origins = dict[str, Origin]
"""Leaf name -> origin, for every leaf."""


def origins_of(config: TrainConfig) -> Origins:
    """Origins of a configuration built in Python: what was set is given by the program, the rest is default."""
    return {
        leaf: Origin("caller" if leaf in getattr(config, section).model_fields_set else "default")
        for leaf, section in SECTION_OF.items()
    }
