"""The form of the Train page: Runner's fields, order and defaults, and every other setting from the configuration tree.

Values travel as text, spelt as flags of `rookery train` are, so that the page, the command shown and the file written
say the same. An empty text means "not given".
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rookery.config import TrainConfig, parse, to_toml
from rookery.config.tree import SECTION_OF, choices, get, leaf_field, section_model, value_type
from rookery.errors import UserError
from rookery.i18n import N_, _
from rookery.ui.places import Places

METHODS: dict[str, tuple[str, str, dict[str, str]]] = {
    "lora": (N_("LoRA"), N_("Small matrices beside the large ones: the usual choice on one GPU"), {"peft": "lora"}),
    "pissa": (N_("PiSSA"), N_("LoRA that begins with the strongest directions: learns faster"), {"peft": "pissa"}),
    "dora": (N_("DoRA"), N_("LoRA with a magnitude of its own for each row"), {"peft": "dora"}),
    "miss": (N_("MiSS"), N_("One matrix shared over blocks: least memory of the adapters"), {"peft": "miss"}),
    "state": (
        N_("State"),
        N_("Only the state a conversation begins with: tiny files, good for style"),
        {"peft": "state"},
    ),
    "full": (N_("Full"), N_("All weights of an existing model go on learning"), {"peft": "none"}),
    "pretrain": (N_("Pretrain"), N_("A new model from nothing"), {"peft": "none"}),
}
"""Method -> name, what it is, and the settings that make it."""

LABELS = {
    "data_file": N_("Training data"),
    "tokenizer": N_("Vocabulary"),
    "val_file": N_("Validation data"),
    "val_split": N_("Held out for validation"),
    "load_model": N_("Base model"),
    "adapter_load": N_("Adapter to continue from"),
    "quant": N_("Base weights"),
    "version": N_("Generation"),
    "n_layer": N_("Layers"),
    "n_embd": N_("Width"),
    "vocab_size": N_("Vocabulary size"),
    "devices": N_("Devices"),
    "precision": N_("Precision"),
    "grad_cp": N_("Gradient checkpoint"),
    "ctx_len": N_("Context length"),
    "epoch_steps": N_("Epoch steps"),
    "epoch_count": N_("Epoch count"),
    "epoch_begin": N_("Epoch begin"),
    "epoch_save": N_("Epoch save"),
    "lr_init": N_("LR init"),
    "lr_final": N_("LR final"),
    "micro_bsz": N_("Micro batch size"),
    "accumulate_grad_batches": N_("Accumulate gradient batches"),
    "warmup_steps": N_("Warm-up steps"),
    "adam_eps": N_("Adam epsilon"),
    "beta1": N_("Beta 1"),
    "beta2": N_("Beta 2"),
    "lora_r": N_("Rank (r)"),
    "lora_alpha": N_("Alpha"),
    "lora_dropout": N_("Dropout"),
    "pre_ffn": N_("Pre-FFN"),
    "head_qk": N_("Head QK"),
    "proj_dir": N_("Run directory"),
    "my_exit_tokens": N_("Tokens to train on"),
    "epochs": N_("Passes over the data"),
}
"""Setting -> what it is called on the page. The others go by their own name, as everywhere in the field."""

GROUPS = {
    "data": ("data_file", "tokenizer"),
    "model": ("load_model", "adapter_load", "quant"),
    "new_model": ("version", "n_layer", "n_embd"),
    "training": (
        "devices", "precision", "grad_cp", "ctx_len", "epoch_steps", "epoch_count", "epoch_begin", "epoch_save",
        "lr_init", "lr_final", "micro_bsz", "accumulate_grad_batches", "warmup_steps", "adam_eps", "beta1", "beta2",
        "lora_r", "lora_alpha", "lora_dropout", "pre_ffn", "head_qk",
    ),
    "run": ("proj_dir",),
}  # fmt: skip
"""The parts of the form that are always open, in Runner's order."""

RUNNER = {
    "devices": "1",
    "precision": "bf16",
    "grad_cp": "1",
    "ctx_len": "1024",
    "epoch_steps": "200",
    "epoch_count": "20",
    "epoch_begin": "0",
    "epoch_save": "1",
    "lr_init": "5e-5",
    "lr_final": "5e-5",
    "micro_bsz": "1",
    "accumulate_grad_batches": "8",
    "warmup_steps": "0",
    "adam_eps": "1e-8",
    "beta1": "0.9",
    "beta2": "0.999",
    "lora_r": "64",
    "lora_alpha": "192",
    "lora_dropout": "0.01",
}
"""RWKV Runner's defaults for fine-tuning."""

PATHS = ("data_file", "val_file", "qa_mix_file", "load_model", "adapter_load", "pissa_init", "proj_dir")
"""Settings that name a file or folder."""

HIDDEN = ("peft",)
"""Settings that the choice of the method decides."""


def defaults(method: str) -> dict[str, str]:
    """The text of every field that begins with one, by method."""
    own = {leaf: as_text(leaf_field(leaf).get_default(call_default_factory=True)) for leaf in SECTION_OF}
    own["proj_dir"] = ""
    if method == "pretrain":
        return own | METHODS[method][2] | {"warmup_steps": "", "micro_bsz": "8"}
    # State tuning has customs of its own, which are found where nothing is given.
    customs = dict.fromkeys(("lr_init", "lr_final", "ctx_len"), "") if method == "state" else {}
    return own | RUNNER | customs | METHODS[method][2]


def schema() -> dict[str, Any]:
    """Everything the page needs to draw the form. Sentences are English; the page translates them."""
    return {
        "methods": [{"id": method, "name": name, "about": about} for method, (name, about, _v) in METHODS.items()],
        "defaults": {method: defaults(method) for method in METHODS},
        "groups": GROUPS,
        "hidden": HIDDEN,
        "paths": PATHS,
        "sections": [
            {
                "name": name,
                "about": section_model(name).__doc__ or "",
                "leaves": list(section_model(name).model_fields),
            }
            for name in TrainConfig.model_fields
        ],
        "fields": {leaf: field(leaf) for leaf in SECTION_OF},
    }


def field(leaf: str) -> dict[str, Any]:
    """Kind, choices, limits, label and help of one setting."""
    limits: dict[str, float] = {}
    for part in leaf_field(leaf).metadata:
        limits |= {name: getattr(part, name) for name in ("ge", "gt", "le", "lt", "multiple_of") if hasattr(part, name)}
    kind = value_type(leaf)
    switch = kind is bool or (kind is int and limits.get("ge") == 0 and limits.get("le") == 1)
    return {
        "kind": "switch" if switch else "choice" if choices(leaf) else kind.__name__,
        "choices": [str(choice) for choice in choices(leaf)],
        "limits": limits,
        "label": LABELS.get(leaf, ""),
        "help": leaf_field(leaf).description or "",
        "open": leaf_field(leaf).default is None,
    }


def as_text(value: Any) -> str:
    """A value as the word of a flag that gives it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, float):
        # Learning rates are written 6e-4 everywhere in the field.
        mantissa, _e, exponent = f"{value:.11e}".partition("e")
        small = 0 < abs(value) < 1e-2
        return f"{float(mantissa):g}e{int(exponent)}" if small else f"{value:.12g}"
    return str(value)


def given(values: Mapping[str, str]) -> dict[str, str]:
    """Those of `values` that say something. A default of the tree says nothing, unless it stands in a field that is
    always seen: what a person sees there is what must happen, whatever a rule would put in its place."""
    own = {leaf: as_text(leaf_field(leaf).get_default(call_default_factory=True)) for leaf in SECTION_OF}
    said = {leaf: text.strip() for leaf, text in values.items() if text.strip()}
    return {leaf: text for leaf, text in said.items() if leaf in RUNNER or text != own[leaf]}


def words(values: Mapping[str, str]) -> list[str]:
    """The flags of `rookery train` that give `values`."""
    found = []
    for leaf, text in values.items():
        found += [f"--{leaf}", *(text.split() if value_type(leaf) is list else [text])]
    return found


def check(values: Mapping[str, str]) -> dict[str, str]:
    """What is wrong with single fields: setting -> one sentence."""
    wrong = {}
    for leaf, text in values.items():
        try:
            parse(words({leaf: text}))
        except UserError as error:
            # The page shows the sentence at the field, so that it need not name the flag.
            wrong[leaf] = str(error).removeprefix(f"--{leaf} {text}: ").removeprefix(f"--{leaf}: ")
    return wrong


def read(values: Mapping[str, Any], places: Places) -> dict[str, str]:
    """The values of a request that are given, with paths inside the folders.

    Raises:
        UserError: an unknown setting, a value that is no text, or a path elsewhere.
    """
    for leaf, text in values.items():
        if leaf not in SECTION_OF or not isinstance(text, str):
            raise UserError(_("there is no setting {key}", key=leaf))
    found = given(values)
    for leaf in PATHS:
        if found.get(leaf):
            places.allowed(found[leaf])
    for part in found.get("mix", "").split():
        places.allowed(part.rpartition(":")[0])
    if (tokenizer := found.get("tokenizer", "")) not in ("", "world", "char", "compact"):
        places.allowed(tokenizer)
    return found


def command(values: Mapping[str, str]) -> str:
    """The line that starts the same run in a terminal."""
    return quoted(["rookery", "train", *words(values)])


def quoted(parts: list[str]) -> str:
    """Words as a person types them into this system's shell."""
    return subprocess.list2cmdline(parts) if sys.platform == "win32" else shlex.join(parts)


def toml(values: Mapping[str, str]) -> str:
    """A recipe with the values that are given, and nothing else.

    Raises:
        UserError: a value is not valid.
    """
    config = parse(words(values)).config
    lines: list[str] = []
    for line in to_toml(config, comments=False).splitlines():
        leaf = line.partition(" =")[0]
        if line.startswith("[") or leaf in values:
            lines.append(line)
    return "\n".join(_without_empty(lines)) + "\n"


def _without_empty(lines: list[str]) -> list[str]:
    """Without sections that have no settings."""
    kept: list[str] = []
    for line, following in zip(lines, [*lines[1:], "["], strict=True):
        if not (line.startswith("[") and following.startswith("[")):
            kept += ["", line] if line.startswith("[") and kept else [line]
    return kept


def read_recipe(text: str) -> dict[str, str]:
    """The values of a recipe, or of a command line of any trainer that Rookery understands.

    Raises:
        UserError: it is neither.
    """
    if not re.search(r"(^|\s)--\w", text):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "recipe.toml"
            file.write_text(text, encoding="utf-8")
            try:
                parsed = parse([], file)
            except UserError as error:
                raise UserError(str(error).replace(str(file), "recipe.toml")) from None
    else:
        try:
            parts = shlex.split(text.replace("\\\r\n", " ").replace("\\\n", " "), comments=True)
        except ValueError as error:
            raise UserError(_("this is no command line: {reason}", reason=error)) from None
        first = next((at for at, part in enumerate(parts) if part.startswith("--")), 0)
        parsed = parse(parts[first:])
    return {leaf: as_text(get(parsed.config, leaf)) for leaf in SECTION_OF if parsed.origins[leaf].kind != "default"}


def method_of(values: Mapping[str, str]) -> str:
    """The method that values amount to."""
    peft = values.get("peft", "none")
    if peft != "none":
        return peft
    return "full" if values.get("load_model") else "pretrain"
