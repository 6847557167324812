"""The tasks of EleutherAI's lm-evaluation-harness, by its own code, on our models."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rookery.errors import UserError
from rookery.eval.perplexity import document_losses
from rookery.i18n import _
from rookery.infer import Engine, Request, Sampling
from rookery.models import Model, State
from rookery.tokenizer import Tokenizer, chat

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate as run_tasks
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(_("Tasks need the package lm-eval: python -m pip install 'rookery[eval]'")) from error

TOKENS = 2048
"""Tokens read in one forward pass, unless one sequence has more."""

SEQUENCES = 32
"""Sequences read in one forward pass, each of which has a state."""

MOST_GENERATED = 256
"""Tokens of an answer when the task does not say; what lm-eval takes for other models."""

SEED = 1234
"""Decides which examples are solved before a question; lm-eval's own."""

LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""How tasks call the most tokens of an answer."""

Progress = Callable[[int, int], None]


class RookeryLM(TemplateLM):
    """One of our models as lm-eval asks for it.

    Requests with the same context read it once. Sequences are packed, so nothing is padded, and none is too long.
    `progress(done, total)` is called in requests of each kind.

    Raises:
        UserError: the vocabulary has no end of document, which stands before every text.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, progress: Progress = lambda done, total: None) -> None:
        super().__init__()
        if tokenizer.end_of_document is None:
            raise UserError(
                _(
                    "The vocabulary {name} has no end of document, which lm-eval wants before a text.",
                    name=tokenizer.name,
                )
            )
        self.model, self.vocabulary, self.progress = model, tokenizer, progress
        self._device = model.emb.weight.device

    @property
    def eot_token_id(self) -> int:
        assert self.vocabulary.end_of_document is not None
        return self.vocabulary.end_of_document

    @property
    def tokenizer_name(self) -> str:
        return self.vocabulary.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        """The ids of a text that begins a document, and so comes after the end of another, unless
        `add_special_tokens` is False."""
        return ([] if add_special_tokens is False else [self.eot_token_id]) + self.vocabulary.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        messages = [chat.Message(entry["role"], entry["content"]) for entry in chat_history]  # type: ignore[arg-type]
        return chat.prompt(messages) if add_generation_prompt else chat.document(messages)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_options: Any
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation): the log-probability of the continuation, and whether it is the
        likeliest."""
        asked: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_texts, context, _continuation) in enumerate(requests):
            asked[tuple(context)].append(number)
        found: dict[int, tuple[float, bool]] = {}
        for contexts in _groups(sorted(asked, key=len, reverse=True), len):
            hidden, states = self._read(contexts, None)
            waiting = [(place, number) for place, context in enumerate(contexts) for number in asked[context]]
            for part in _groups(waiting, lambda pair: len(requests[pair[1]][2])):
                ends = [hidden[place][-1:] for place, _number in part]
                continuations = [requests[number][2] for _place, number in part]
                scores = self._score(continuations, ends, states.select(torch.tensor([place for place, _ in part])))
                found.update(zip((number for _place, number in part), scores, strict=True))
                self.progress(len(found), len(requests))
        return [found[number] for number in range(len(requests))]

    def _read(self, sequences: Sequence[Sequence[int]], states: State | None) -> tuple[Sequence[Tensor], State]:
        """What the head takes, (T, C) of each sequence, and the states after them."""
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        tokens = torch.tensor([[id for sequence in sequences for id in sequence]], device=self._device)
        hidden, states = self.model.hidden(tokens, states, lengths=lengths)
        return hidden[0].split(lengths.tolist()), states

    def _score(
        self, continuations: Sequence[list[int]], ends: Sequence[Tensor], states: State
    ) -> Iterator[tuple[float, bool]]:
        """Scores of continuations of contexts that left `states`, and `ends` (1, C) for the head."""
        hidden = list(ends)
        longer = [row for row, continuation in enumerate(continuations) if len(continuation) > 1]
        if longer:
            rest, _states = self._read([continuations[row][:-1] for row in longer], states.select(torch.tensor(longer)))
            for row, further in zip(longer, rest, strict=True):
                hidden[row] = torch.cat([ends[row], further])
        sizes = [len(continuation) for continuation in continuations]
        logits = self.model.head(torch.cat([h[:size] for h, size in zip(hidden, sizes, strict=True)])).float()
        targets = torch.tensor([id for continuation in continuations for id in continuation], device=self._device)
        losses = F.cross_entropy(logits, targets.long(), reduction="none").double().cpu()
        right = (logits.argmax(-1) == targets).cpu()
        for loss, likeliest in zip(losses.split(sizes), right.split(sizes), strict=True):
            yield -float(loss.sum()), bool(likeliest.all())

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        documents = (self.tok_encode(request.args[0]) for request in requests)
        found = []
        for loss in document_losses(self.model, documents):
            found.append(-loss)
            self.progress(len(found), len(requests))
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        found = []
        with Engine(self.model, self.vocabulary, waiting=len(requests)) as engine:
            handles = []
            for request in requests:
                context, options = request.args
                handles.append(engine.submit(Request(self.tok_encode(context), self._sampling(options))))
            for handle in handles:
                found.append(handle.result().text)
                self.progress(len(found), len(requests))
        return found

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        until = options.get("until") or ()
        longest = [options[name] for name in LENGTH_NAMES if name in options]
        temperature = float(options.get("temperature", 1.0 if options.get("do_sample") else 0.0))
        return Sampling(
            temperature=temperature if options.get("do_sample", True) else 0,
            top_p=float(options.get("top_p", 1.0)),
            top_k=int(options.get("top_k", 0)),
            alpha_presence=0,
            alpha_frequency=0,
            stop=(until,) if isinstance(until, str) else tuple(until),
            token_stop=(self.eot_token_id,),
            max_tokens=int(longest[0]) if longest else MOST_GENERATED,
        )


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    few_shot: int | None = None,
    limit: int = 0,
    as_chat: bool = False,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Run tasks and give what eval.json holds under "tasks".

    Args:
        tasks: names that lm-eval knows, whose data it downloads, or task files (.yaml). Such a file may name Python
            functions beside it, which are run: it is a program to be trusted like one.
        few_shot: solved examples before each question; None for what the task says.
        limit: examples of each task, from the first on; 0 = all.
        as_chat: put questions as a user's, and take answers as the assistant's.

    Raises:
        UserError: a task or its data cannot be loaded, or the vocabulary has no end of document.
    """
    files = [name for name in tasks if name.endswith((".yaml", ".yml"))]
    for file in files:
        if not Path(file).is_file():
            raise UserError(_("{path} does not exist", path=file))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = RookeryLM(model, tokenizer, progress)
    try:
        loaded = TaskManager(include_defaults=len(files) < len(tasks)).load(list(tasks))
    except Exception as error:  # whatever a task file, its functions and the loaders of data come up with
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise UserError(
            _("The tasks {names} cannot be loaded: {reason}", names=", ".join(tasks), reason=reason)
        ) from error
    for task in loaded["tasks"].values():
        shown = task.get_config("num_fewshot")
        if shown is None or (few_shot is not None and shown != 0):  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=few_shot or 0)
        task.set_fewshot_seed(seed=SEED)
    found = run_tasks(
        lm=lm,
        task_dict=loaded,
        limit=limit or None,
        log_samples=False,
        apply_chat_template=as_chat,
        fewshot_as_multiturn=as_chat,
    )
    assert found is not None, "this process is the only one"
    return {
        "lm_eval": version("lm-eval"),
        "as_chat": as_chat,
        "results": {
            name: {
                "n": found["n-samples"].get(name, {}).get("effective"),
                "few_shot": found["n-shot"].get(name),
                "version": found["versions"].get(name),
                **{metric.removesuffix(",none"): value for metric, value in figures.items() if "," in metric},
            }
            for name, figures in found["results"].items()
        },
    }


def _groups(items: Sequence[Any], size: Callable[[Any], int]) -> Iterator[list[Any]]:
    """`items` in order, as many together as may be read in one pass."""
    group: list[Any] = []
    total = 0
    for item in items:
        if group and (total + size(item) > TOKENS or len(group) == SEQUENCES):
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group
