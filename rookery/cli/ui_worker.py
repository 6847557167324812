"""The helper process of the console: answers questions that need torch, one JSON object a line, until its input ends.

`python -m rookery.cli.ui_worker`; `rookery.ui.worker` speaks with it. A question has ``operation`` (a key of
`OPERATIONS`), ``language`` and arguments; the answer ``result``, or ``error`` in words for people and ``trace`` when it
is our fault.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rookery.errors import UserError
from rookery.i18n import set_language

if TYPE_CHECKING:
    from rookery.config.memory import Plan


def check(words: list[str], gpu_free: int | None) -> dict[str, Any]:
    """What `rookery train WORDS` would do: every value and where it comes from, what it says about them, and the memory
    it would take; `gpu_free` are the bytes that nvidia-smi says are free."""
    from rookery.config import differences, parse
    from rookery.config.memory import Plan
    from rookery.config.tree import SECTION_OF, get
    from rookery.data import BinIdx
    from rookery.train import prepare
    from rookery.train.rundir import RunFiles

    parsed = parse(words)
    resolved = prepare(parsed.config, parsed.origins)
    config = resolved.config
    files = RunFiles(config.run.proj_dir)
    other: list[Any] = []
    if files.config_file.exists() and any(files.checkpoints.glob("step-*")):
        other = [(d.leaf, d.before, d.after) for d in differences(parse([], files.config_file).config, config)]
    data = BinIdx(config.data.data_file) if config.data.data_type == "binidx" else None
    return {
        "memory": memory(Plan.of(config), gpu_free),
        "data": data and {"tokens": data.tokens, "documents": len(data)},
        "values": {leaf: get(config, leaf) for leaf in SECTION_OF},
        "origins": {leaf: str(resolved.origins[leaf]) for leaf in SECTION_OF},
        "notes": [*parsed.notes, *resolved.notes],
        "differences": other,
    }


def memory(plan: Plan, gpu_free: int | None) -> dict[str, Any]:
    """What a training needs (bytes), of how much, whether that fits, and flags with which it would."""
    from rookery.config.memory import estimate, fits, largest_micro_bsz, remedies
    from rookery.train.memory import free_memory

    # PyTorch would take hold of the GPU only to ask how much of it is free.
    room = gpu_free if plan.accelerator == "cuda" and gpu_free is not None else free_memory(plan.accelerator)
    if plan.micro_bsz == 0:
        plan = replace(plan, micro_bsz=max(1, largest_micro_bsz(plan, room)))
    need = estimate(plan).total
    verdict = "fits" if fits(plan, room) else "tight" if need <= room else "will not fit"
    changes = [] if verdict == "fits" else [(remedy.flags, remedy.total) for remedy in remedies(plan, room)]
    return {"need": need, "free": room, "verdict": verdict, "micro_bsz": plan.micro_bsz, "remedies": changes}


def describe(paths: list[str]) -> list[dict[str, Any]]:
    """What each file holds; ``error`` of one that cannot be read."""
    from rookery.formats.describe import describe as facts_of

    found = []
    for path in paths:
        try:
            found.append(facts_of(Path(path)))
        except UserError as error:
            found.append({"file": path, "error": str(error)})
    return found


def preview(words: list[str], rows: int) -> dict[str, Any]:
    """What training would make of the data that these flags name."""
    from rookery.config import parse
    from rookery.data.preview import preview as look

    return asdict(look(parse(words).config.data, rows=rows))


OPERATIONS: dict[str, Callable[..., Any]] = {"check": check, "describe": describe, "preview": preview}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to one question."""
    set_language(question.pop("language"))
    try:
        return {"result": OPERATIONS[question.pop("operation")](**question)}
    except UserError as error:
        return {"error": str(error), "trace": ""}
    except Exception as error:
        return {"error": str(error) or type(error).__name__, "trace": traceback.format_exc()}


def main() -> None:
    """Answer until the console closes the pipe."""
    # What a library prints must not be taken for an answer.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line)), default=str) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
