"""The arithmetic data set: multi-turn addition and subtraction in several scripts, made here from a seed.

It follows the data of RWKV's pretraining tutorial (RWKV-7-Arithmetic): dialogues of ten to twenty turns such as
``User: 一百二十三 + 45 = ?\\n\\nAssistant: 168``, equations in ``x`` among them, numbers as half-width and full-width
digits, Chinese, formal Chinese and English numerals. Answers are always half-width digits.

A problem is what is asked, whatever its script and wording. Each belongs to the training data or is held out for
evaluation by a hash of itself, so the two never meet, in any level and for any seed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
from bisect import bisect
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from itertools import accumulate, islice
from pathlib import Path

from rookery.data.numerals import SCRIPTS
from rookery.errors import UserError
from rookery.i18n import _

HELD_OUT_SHARE = 0.05
"""Share of all problems that never occur in training data."""

CHUNK = 500
"""Dialogues made from one derived seed: the unit of work of a process."""


@dataclass(frozen=True)
class Form:
    """A kind of problem: how it is written and what its answer is.

    Attributes:
        pattern: the question with `{a}`, `{b}` and the operators `{plus}`, `{minus}`, `{equals}`.
        problem: name of the problem it asks; two forms that ask the same, such as x+a=b and a+x=b, share it.
        commutes: a and b may be exchanged without changing the problem.
        given: from the two numbers drawn, the two that the question shows.
        answer: from the numbers shown, the answer.
    """

    pattern: str
    problem: str
    commutes: bool
    given: Callable[[Decimal, Decimal], tuple[Decimal, Decimal]]
    answer: Callable[[Decimal, Decimal], Decimal]


FORMS: dict[str, Form] = {
    "a+b": Form("{a}{plus}{b}", "a+b", True, lambda p, q: (p, q), lambda a, b: a + b),
    "a-b": Form("{a}{minus}{b}", "a-b", False, lambda p, q: (p, q), lambda a, b: a - b),
    "x+a=b": Form("x{plus}{a}{equals}{b}", "x+a=b", False, lambda x, a: (a, x + a), lambda a, b: b - a),
    "a+x=b": Form("{a}{plus}x{equals}{b}", "x+a=b", False, lambda x, a: (a, x + a), lambda a, b: b - a),
    "x-a=b": Form("x{minus}{a}{equals}{b}", "x-a=b", False, lambda x, a: (a, x - a), lambda a, b: b + a),
    "a-x=b": Form("{a}{minus}x{equals}{b}", "a-x=b", False, lambda x, a: (a, a - x), lambda a, b: a - b),
}
SUMS = ("a+b", "a-b")
EQUATIONS = ("x+a=b", "a+x=b", "x-a=b", "a-x=b")


@dataclass(frozen=True)
class Wording:
    """One way of asking. Operators that are words of English take spaces; others may."""

    plus: tuple[str, ...]
    minus: tuple[str, ...]
    equals: tuple[str, ...]
    sums: tuple[str, ...]
    equations: tuple[str, ...]
    only_plus: tuple[str, ...] = ()
    only_minus: tuple[str, ...] = ()
    spaced: bool = False

    def templates(self, form: str) -> tuple[str, ...]:
        """Sentences that can ask a problem of this form; `{}` is the expression."""
        if form in EQUATIONS:
            return self.equations
        return self.sums + (self.only_plus if form == "a+b" else self.only_minus)


WORDINGS: dict[str, Wording] = {
    "symbols": Wording(
        plus=("+",),
        minus=("-",),
        equals=("=",),
        sums=("{}", "{}=", "{}=?", "{} = ?"),
        equations=("{}, x=?", "{}，x=?", "{}, x = ?", "{} x=?"),
    ),
    "full-width": Wording(
        plus=("＋",),
        minus=("－",),
        equals=("＝",),
        sums=("{}", "{}＝", "{}＝？"),
        equations=("{}，x＝？", "{} x＝？"),
    ),
    "chinese": Wording(
        plus=("加", "加上"),
        minus=("减", "减去"),
        equals=("等于", "="),
        sums=(
            "{}等于多少?",
            "{}等于多少？",
            "{}是多少？",
            "{}得多少？",
            "{}等于几？",
            "{}的结果是多少？",
            "请计算{}",
            "计算：{}",
            "{}=?",
        ),
        only_plus=("{}一共是多少？",),
        only_minus=("{}还剩多少?", "{}还剩多少？"),
        equations=(
            "{}，x等于多少？",
            "{}，x是多少？",
            "{}，求x",
            "解方程：{}",
            "若{}，则x等于多少？",
            "已知{}，求x的值",
        ),
    ),
    "english": Wording(
        plus=("plus",),
        minus=("minus",),
        equals=("equals", "is"),
        sums=(
            "{} equals?",
            "{} = ?",
            "{} equals what?",
            "what is {}?",
            "how much is {}?",
            "calculate {}",
            "{} is how much?",
        ),
        equations=("{}, x = ?", "solve {}", "solve for x: {}", "if {}, what is x?", "{}, find x"),
        spaced=True,
    ),
}

CASES: dict[str, Callable[[str, random.Random], str]] = {
    "lower": lambda text, rng: text.lower(),
    "upper": lambda text, rng: text.upper(),
    "capitalised": lambda text, rng: text[:1].upper() + text[1:].lower(),
    "mixed": lambda text, rng: "".join(c.upper() if rng.getrandbits(1) else c.lower() for c in text),
}


@dataclass(frozen=True)
class Level:
    """What one level asks. Weights are relative.

    Attributes:
        max_operand: largest operand.
        by_length: draw the number of digits first, so that short numbers are as frequent as long ones.
        decimals: most decimal places; the number of places is drawn evenly from 0 up.
        negative: share of negative operands.
        zeros: share of operands most of whose digits are made 0.
        scripts: weight of each script; every operand draws its own.
        forms: weight of each form.
        wordings: weight of each wording.
        cases: letter cases that a question in English letters may take.
        turns: fewest and most turns of a dialogue.
    """

    name: str
    max_operand: int
    scripts: dict[str, float]
    forms: dict[str, float]
    wordings: dict[str, float]
    by_length: bool = False
    decimals: int = 0
    negative: float = 0.0
    zeros: float = 0.0
    cases: tuple[str, ...] = ("lower",)
    turns: tuple[int, int] = (10, 20)


def _even(*names: str) -> dict[str, float]:
    return dict.fromkeys(names, 1.0)


LEVELS: dict[str, Level] = {
    level.name: level
    for level in (
        Level(
            "basic",
            max_operand=99,
            scripts=_even("half", "chinese"),
            forms=_even(*SUMS),
            wordings=_even("symbols"),
        ),
        Level(
            "scripts",
            max_operand=99,
            scripts=_even("half", "full", "chinese", "formal"),
            forms=_even(*SUMS),
            wordings={"symbols": 2.0, "chinese": 1.0},
        ),
        Level(
            "equations",
            max_operand=99,
            scripts=_even("half", "full", "chinese", "formal"),
            forms=_even(*SUMS) | dict.fromkeys(EQUATIONS, 0.5),
            wordings={"symbols": 2.0, "chinese": 1.0},
        ),
        Level(
            "languages",
            max_operand=99,
            scripts=_even("half", "full", "chinese", "formal", "english"),
            forms=_even(*SUMS) | dict.fromkeys(EQUATIONS, 0.5),
            wordings={"symbols": 2.0, "chinese": 1.0, "english": 1.0},
        ),
        Level(
            "hundreds",
            max_operand=999,
            negative=0.1,
            scripts=_even("half", "full", "chinese", "formal"),
            forms=_even(*SUMS) | dict.fromkeys(EQUATIONS, 0.5),
            wordings={"symbols": 2.0, "chinese": 1.0},
        ),
        Level(
            "full",
            max_operand=10**12 - 1,
            by_length=True,
            decimals=6,
            negative=0.2,
            zeros=0.1,
            scripts={
                "half": 3.0,
                "full": 1.0,
                "chinese": 1.0,
                "colloquial": 0.5,
                "formal": 1.0,
                "traditional": 0.5,
                "english": 1.5,
            },
            forms={"a+b": 3.0, "a-b": 3.0} | dict.fromkeys(EQUATIONS, 1.0),
            wordings={"symbols": 3.0, "full-width": 0.5, "chinese": 2.0, "english": 2.0},
            cases=tuple(CASES),
        ),
    )
}
"""Every level of the data set, easiest first; `full` is the tutorial's whole mixture."""


@dataclass(frozen=True)
class Question:
    """One question and its answer.

    Attributes:
        text: what the user says.
        answer: the exact answer in half-width digits.
        form: key of `FORMS`.
        scripts: the scripts of the two operands, in the order in which they are read.
        problem: the problem asked, the same for every script and wording.
    """

    text: str
    answer: str
    form: str
    scripts: tuple[str, str]
    problem: str


def find_level(name: str) -> Level:
    """The level of that name.

    Raises:
        UserError: there is none.
    """
    try:
        return LEVELS[name]
    except KeyError:
        raise UserError(
            _("There is no arithmetic level {name}. Levels: {levels}.", name=repr(name), levels=", ".join(LEVELS))
        ) from None


def plain(number: Decimal) -> str:
    """`number` in half-width digits, without exponent, trailing zeros or a negative zero."""
    text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def is_held_out(problem: str) -> bool:
    """Whether a problem belongs to the evaluation: a fixed share of all, chosen by hash."""
    digest = hashlib.blake2b(problem.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < HELD_OUT_SHARE * 2**64


class Generator:
    """Draws questions of one level; the same seed gives the same questions."""

    def __init__(self, level: Level, seed: int | str) -> None:
        self.level = level
        self.rng = random.Random(f"rookery arithmetic {level.name} {seed}")
        self._forms = _Choice(level.forms)
        self._scripts = _Choice(level.scripts)
        self._wordings = _Choice(level.wordings)

    def number(self) -> Decimal:
        """An operand."""
        rng, level = self.rng, self.level
        largest = level.max_operand
        if level.by_length:
            largest = min(largest, 10 ** rng.randint(1, len(str(largest))) - 1)
        places = rng.randint(0, level.decimals) if level.decimals else 0
        value = rng.randint(0, largest * 10**places)
        if level.zeros and rng.random() < level.zeros:
            value = int("".join(digit if rng.random() < 0.4 else "0" for digit in str(value)))
        if level.negative and rng.random() < level.negative:
            value = -value
        return Decimal(value).scaleb(-places)

    def question(self, held_out: bool) -> Question:
        """A question whose problem is held out, or one for the training data."""
        while True:
            name = self._forms.draw(self.rng)
            form = FORMS[name]
            a, b = form.given(self.number(), self.number())
            shown = plain(a), plain(b)
            problem = " ".join((form.problem, *(sorted(shown) if form.commutes else shown)))
            if is_held_out(problem) == held_out:
                break
        scripts = self._scripts.draw(self.rng), self._scripts.draw(self.rng)
        text = self._ask(name, shown, scripts)
        return Question(text, plain(form.answer(a, b)), name, scripts, problem)

    def _ask(self, form: str, numbers: tuple[str, str], scripts: tuple[str, str]) -> str:
        wording = WORDINGS[self._wordings.draw(self.rng)]

        def operator(names: tuple[str, ...]) -> str:
            space = " " if wording.spaced or self.rng.getrandbits(1) else ""
            return space + self._pick(names) + space

        a, b = (SCRIPTS[script](number) for script, number in zip(scripts, numbers, strict=True))
        expression = FORMS[form].pattern.format(
            a=a, b=b, plus=operator(wording.plus), minus=operator(wording.minus), equals=operator(wording.equals)
        )
        text = self._pick(wording.templates(form)).format(expression)
        if wording.spaced or "english" in scripts:
            text = CASES[self._pick(self.level.cases)](text, self.rng)
        return text

    def _pick(self, names: tuple[str, ...]) -> str:
        return names[int(self.rng.random() * len(names))]

    def dialogue(self) -> str:
        """A dialogue of training questions, in the chat template of the World models."""
        turns = self.rng.randint(*self.level.turns)
        questions = (self.question(held_out=False) for _turn in range(turns))
        return "\n\n".join(f"User: {q.text}\n\nAssistant: {q.answer}" for q in questions)


class _Choice:
    """Weighted choice among names, with the weights summed once."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.names = list(weights)
        self.sums = list(accumulate(weights.values()))

    def draw(self, rng: random.Random) -> str:
        return self.names[bisect(self.sums, rng.random() * self.sums[-1], hi=len(self.names) - 1)]


def evaluation(level: Level, n: int, seed: int = 0) -> list[Question]:
    """`n` held-out questions, each text once.

    Raises:
        UserError: the level has too few held-out questions for `n`.
    """
    generator = Generator(level, f"evaluation {seed}")
    found: dict[str, Question] = {}
    for question in islice((generator.question(held_out=True) for _draw in iter(int, 1)), 20 * n):
        found.setdefault(question.text, question)
        if len(found) >= n:
            return list(found.values())
    raise UserError(
        _(
            "Level {level} has only {found} different held-out questions or so, fewer than {n}. Use a smaller -n.",
            level=level.name,
            found=len(found),
            n=n,
        )
    )


def _chunk(level: Level, seed: int, chunk: int, dialogues: int) -> str:
    """The jsonl lines of one chunk."""
    generator = Generator(level, f"training {seed} {chunk}")
    return "".join(json.dumps({"text": generator.dialogue()}, ensure_ascii=False) + "\n" for _line in range(dialogues))


def _ignore_interrupt() -> None:
    """Ctrl-C is the parent's to answer; workers end when it leaves the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _chunks(level: Level, seed: int, sizes: Iterable[int], workers: int) -> Iterator[str]:
    """The text of every chunk, in order; never more than a few waiting."""
    if workers <= 1:
        for chunk, size in enumerate(sizes):
            yield _chunk(level, seed, chunk, size)
        return
    waiting: deque[Future[str]] = deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _ignore_interrupt)
    try:
        for chunk, size in enumerate(sizes):
            waiting.append(pool.submit(_chunk, level, seed, chunk, size))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def write(
    path: str | os.PathLike[str],
    level: Level,
    dialogues: int,
    *,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write `dialogues` lines ``{"text": …}`` to `path`, which appears only when it is whole.

    The text depends on the level, the number and the seed, not on `workers` (processes; chosen when not given).
    `progress(done, total)` is called in dialogues. Returns the bytes written.
    """
    path = Path(path)
    if workers is None:
        workers = 1 if dialogues < 50_000 else os.cpu_count() or 1
    sizes = [CHUNK] * (dialogues // CHUNK) + [dialogues % CHUNK] * (dialogues % CHUNK > 0)
    unfinished = path.with_name(path.name + ".partial")
    done = size = 0
    try:
        with open(unfinished, "wb") as file:
            for count, text in zip(sizes, _chunks(level, seed, sizes, workers), strict=True):
                size += file.write(text.encode())
                done += count
                if progress:
                    progress(done, dialogues)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return size
