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
    from rookery.config.tree import DataSection


def check(words: list[str], gpu_free: int | None) -> dict[str, Any]:
    """What `rookery train WORDS` would do: every value, what it says about them, and the memory it would take.

    `gpu_free` are the bytes that nvidia-smi says are free."""
    from rookery.config import parse
    from rookery.config.memory import Plan
    from rookery.config.tree import SECTION_OF, get
    from rookery.train.prepare import prepare_run
    from rookery.train.rundir import RunFiles

    parsed = parse(words)
    files = RunFiles(parsed.config.run.proj_dir)
    prepared = prepare_run(parsed.config, parsed.origins, files, lambda text: None, open_data=opened)
    resolved, facts = prepared.resolved, prepared.dataset.facts
    config = resolved.config
    return {
        "memory": memory(Plan.of(config), gpu_free),
        "data": {"tokens": facts.tokens, "documents": facts.documents, "samples": facts.samples},
        "values": {leaf: get(config, leaf) for leaf in SECTION_OF},
        "notes": [*parsed.notes, *prepared.dataset.notes, *resolved.notes],
    }


_opened: dict[Any, Any] = {}
"""Settings and the state of the files they name -> the data that `opened` gave last."""


def opened(data: DataSection, **others: Any) -> Any:
    """`open_datasets`, which reads all of a text, once for all changes of the form that leave the data alone."""
    from rookery.data import open_datasets

    named = [data.data_file, data.val_file, data.qa_mix_file, *(part.rpartition(":")[0] for part in data.mix or [])]
    key = (data.model_dump_json(), *sorted(others.items()), *(state_of(name) for name in named if name))
    if key not in _opened:
        _opened.clear()  # before the others are read: both may be large
        _opened[key] = open_datasets(data, **others)
    return _opened[key]


def state_of(name: str) -> tuple[Any, ...]:
    """Changes whenever a file, a folder's files or binidx data do."""
    path = Path(name)
    files = sorted(path.rglob("*")) if path.is_dir() else [path, Path(f"{name}.bin"), Path(f"{name}.idx")]
    found = (file.stat() for file in files if file.exists())
    return name, *((stat.st_mtime_ns, stat.st_size) for stat in found)


def memory(plan: Plan, gpu_free: int | None) -> dict[str, Any]:
    """What a training needs (bytes), of how much, whether that fits, and flags with which it would."""
    from rookery.config.memory import estimate, fits, largest_micro_bsz
    from rookery.config.remedies import remedies
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
