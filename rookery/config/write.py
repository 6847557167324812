"""The configuration as TOML, and the difference of two."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from rookery.config.origin import Origins
from rookery.config.tree import SECTION_OF, TrainConfig, get, leaf_field, section_model

MAY_CHANGE = frozenset(
    leaf
    for leaf, section in SECTION_OF.items()
    if section == "log"
    or leaf
    in (
        "proj_dir",
        "val_file",
        "val_every",
        "early_stop",
        "merge",
        "num_workers",
        "epoch_save",
        "my_exit",
        "save_every",
        "grad_cp",
        "offload_activations",
        "head_chunk",
        "kernel",
        "accelerator",
        "strategy",
        "ds_bucket_mb",
    )
)
"""Leaves that may differ between two sessions of one run.

They say what is reported and saved, where it runs and how fast; samples, schedule and model stay the same. Everything
else would make the losses that follow other than those of the uninterrupted run, also `my_exit_tokens` and the learning
rates, since the schedule behind the steps already done would change.
"""

_BATCH_LEAVES = ("micro_bsz", "accumulate_grad_batches", "devices", "num_nodes", "context_parallel")
"""Only what they make together matters: the samples of one optimiser step."""


def samples_of_step(config: TrainConfig) -> int:
    """Samples of one optimiser step."""
    return config.run.micro_bsz * config.run.accumulate_grad_batches * config.device.groups


class Difference(NamedTuple):
    """One leaf with its value in each of two configurations."""

    leaf: str
    before: Any
    after: Any


def differences(before: TrainConfig, after: TrainConfig) -> list[Difference]:
    """Why the run of configuration `before` cannot be continued with `after`; empty when it can.

    Both are resolved. A run that only wrote initial weights (`train_stage` 1) ties nobody to its settings.
    """
    if before.run.train_stage == 1:
        return []
    same_batch = samples_of_step(before) == samples_of_step(after)
    ignored = MAY_CHANGE | (set(_BATCH_LEAVES) if same_batch else set())
    return [
        Difference(leaf, get(before, leaf), get(after, leaf))
        for leaf in SECTION_OF
        if leaf not in ignored and get(before, leaf) != get(after, leaf)
    ]


def to_toml(config: TrainConfig, *, comments: bool = True, origins: Origins | None = None) -> str:
    """`config` as TOML text that `parse` reads back to an equal configuration.

    A value of None is a comment without value. With `comments`, each key has its description above it and, when
    `origins` are given, its origin behind it.
    """
    lines: list[str] = []
    for section in TrainConfig.model_fields:
        model = section_model(section)
        if lines:
            lines.append("")
        if comments:
            lines.append(f"# {(model.__doc__ or '').strip().splitlines()[0]}")
        lines.append(f"[{section}]")
        for leaf in model.model_fields:
            value = get(config, leaf)
            line = f"# {leaf} =" if value is None else f"{leaf} = {_literal(value)}"
            if comments:
                lines.append(f"# {leaf_field(leaf).description}")
                line += f"  # {_one_line(str(origins[leaf]))}" if origins else ""
            lines.append(line)
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _literal(value: Any) -> str:
    """`value` as a TOML literal."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)} = {_literal(item)}" for key, item in value.items()) + "}"
    return repr(value)
