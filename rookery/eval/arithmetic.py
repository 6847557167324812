"""Exact answers to arithmetic problems that were held out of the training data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rookery.data.arithmetic import Level, Question, evaluation
from rookery.eval.answers import likeliest
from rookery.models import Model
from rookery.tokenizer import Tokenizer, chat

SAMPLES = 10


@dataclass(frozen=True)
class Answered:
    """A question and what the model said."""

    question: Question
    said: str

    @property
    def right(self) -> bool:
        return self.said == self.question.answer


@dataclass(frozen=True)
class Result:
    """The answers of one evaluation."""

    level: str
    seed: int
    answers: list[Answered]

    @property
    def exact(self) -> float:
        """Share of the answers that equal the expected one in every character."""
        return share(self.answers)

    def samples(self, n: int = SAMPLES) -> list[Answered]:
        """`n` answers, wrong ones among them where there are: at most half wrong, unless there is nothing else."""
        wrong = [answer for answer in self.answers if not answer.right]
        right = [answer for answer in self.answers if answer.right]
        shown_wrong = wrong[: max(n // 2, n - len(right))]
        shown = set(map(id, shown_wrong + right[: n - len(shown_wrong)]))
        return [answer for answer in self.answers if id(answer) in shown]

    def report(self) -> dict[str, Any]:
        """What eval.json holds under "arithmetic"."""
        by_form: dict[str, list[Answered]] = {}
        by_script: dict[str, list[Answered]] = {}
        for answer in self.answers:
            by_form.setdefault(answer.question.form, []).append(answer)
            for script in set(answer.question.scripts):
                by_script.setdefault(script, []).append(answer)
        return {
            "exact": self.exact,
            "n": len(self.answers),
            "level": self.level,
            "seed": self.seed,
            "by_form": {form: share(answers) for form, answers in sorted(by_form.items())},
            "by_script": {script: share(answers) for script, answers in sorted(by_script.items())},
            "samples": [
                {"user": a.question.text, "assistant": a.said, "expected": a.question.answer, "right": a.right}
                for a in self.samples()
            ],
        }


def share(answers: Iterable[Answered]) -> float:
    """Share of right answers, rounded to four places."""
    rights = [answer.right for answer in answers]
    return round(sum(rights) / len(rights), 4)


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    level: Level,
    *,
    n: int = 500,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Ask `n` held-out questions, each alone in a fresh conversation, and take the likeliest answer to each.

    `progress(done, total)` is called in answers.

    Raises:
        UserError: the level has fewer questions, or the tokenizer lacks a character of them.
    """
    questions = evaluation(level, n, seed)
    prompts = [chat.prompt([chat.Message("user", question.text)]) for question in questions]
    said = likeliest(model, tokenizer, prompts, [question.answer for question in questions], progress)
    return Result(level.name, seed, [Answered(*answer) for answer in zip(questions, said, strict=True)])
