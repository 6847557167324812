"""The arithmetic data set: numerals, answers, the held-out split, the file."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rookery.data import arithmetic, numerals
from rookery.errors import UserError

CHINESE = {c: i for i, c in enumerate("零一二三四五六七八九")} | {c: i for i, c in enumerate("零壹贰叁肆伍陆柒捌玖")}
CHINESE["两"] = 2
UNITS = {"十": 10, "拾": 10, "百": 100, "佰": 100, "千": 1000, "仟": 1000}
SECTIONS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
ENGLISH = {word: i for i, word in enumerate(numerals.ENGLISH_SMALL)}
ENGLISH |= {word: 10 * i for i, word in enumerate(numerals.ENGLISH_TENS) if word}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def read_chinese(text: str) -> Fraction:
    sign, text = (-1, text[1:]) if text[0] == "负" else (1, text)
    whole, _, fraction = text.partition("点")
    total = section = digit = 0
    for character in whole:
        if character in CHINESE:
            digit = CHINESE[character]
        elif character in UNITS:
            section += (digit or 1) * UNITS[character]
            digit = 0
        else:
            section += digit
            total = (total + section) * SECTIONS[character] if SECTIONS[character] == 10**8 else total + section * 10**4
            section = digit = 0
    value = Fraction(total + section + digit)
    for place, character in enumerate(fraction, 1):
        value += Fraction(CHINESE[character], 10**place)
    return sign * value


def read_english(text: str) -> Fraction:
    words = text.lower().replace("-", " ").split()
    sign, words = (-1, words[1:]) if words[0] == "negative" else (1, words)
    point = words.index("point") if "point" in words else len(words)
    total = group = 0
    for word in words[:point]:
        if word == "hundred":
            group *= 100
        elif word in SCALES:
            total += group * SCALES[word]
            group = 0
        else:
            group += ENGLISH[word]
    value = Fraction(total + group)
    for place, word in enumerate(words[point + 1 :], 1):
        value += Fraction(ENGLISH[word], 10**place)
    return sign * value


def read(text: str) -> Fraction:
    """A number in any script."""
    text = text.strip()
    if re.search("[a-zA-Z]", text):
        return read_english(text)
    if re.search("[0-9０-９]", text):
        return Fraction(text.replace("－", "-").replace("．", "."))
    return read_chinese(text)


NUMBERS = st.decimals(-(10**13) + 1, 10**13 - 1, places=6, allow_nan=False).map(arithmetic.plain)


@given(NUMBERS)
@pytest.mark.parametrize("script", numerals.SCRIPTS)
def test_every_spelling_reads_back(script: str, number: str) -> None:
    assert read(numerals.SCRIPTS[script](number)) == Fraction(number)


@pytest.mark.parametrize(
    ("script", "number", "spelling"),
    [
        ("half", "-120.05", "-120.05"),
        ("full", "-120.05", "－１２０．０５"),
        ("chinese", "0", "零"),
        ("chinese", "-12.305", "负十二点三零五"),
        ("chinese", "110", "一百一十"),
        ("chinese", "1001", "一千零一"),
        ("chinese", "1010", "一千零一十"),
        ("chinese", "10100", "一万零一百"),
        ("chinese", "100010", "十万零一十"),
        ("chinese", "11000", "一万一千"),
        ("chinese", "10001000", "一千万一千"),
        ("chinese", "100001000", "一亿零一千"),
        ("chinese", "100000001", "一亿零一"),
        ("chinese", "101000000000", "一千零一十亿"),
        ("chinese", "1000000000000", "一万亿"),
        ("colloquial", "22222", "两万两千两百二十二"),
        ("colloquial", "-200000000", "负两亿"),
        ("colloquial", "120002", "十二万零二"),
        ("colloquial", "2.2", "二点二"),
        ("formal", "10", "壹拾"),
        ("formal", "8983.4269", "捌仟玖佰捌拾叁点肆贰陆玖"),
        ("traditional", "97414394", "玖仟柒佰肆拾壹萬肆仟叁佰玖拾肆"),
        ("english", "123", "one hundred twenty-three"),
        ("english", "-1000000.07", "negative one million point zero seven"),
        ("english", "0.5", "zero point five"),
    ],
)
def test_spelling(script: str, number: str, spelling: str) -> None:
    assert numerals.SCRIPTS[script](number) == spelling


def test_a_number_too_long_to_spell_is_refused() -> None:
    with pytest.raises(ValueError, match="15 integer digits"):
        numerals.chinese("1" * 16)


NUMBER = r"-?[0-9]+|－?[０-９]+|[负零一二三四五六七八九十百千壹贰叁肆伍陆柒捌玖拾佰仟]+"
SUM = re.compile(rf"({NUMBER}) ?([+＋]|[-－]) ?({NUMBER}) ?[=＝]? ?[?？]?")


@pytest.mark.parametrize("name", ["basic", "hundreds"])
def test_answers_of_sums_are_exact(name: str) -> None:
    generator = arithmetic.Generator(arithmetic.LEVELS[name], 3)
    checked: Counter[str] = Counter()
    for _n in range(4000):
        question = generator.question(held_out=False)
        match = SUM.fullmatch(question.text)
        if question.form in arithmetic.SUMS and match:
            a, operator, b = match.groups()
            expected = read(a) + read(b) if operator in "+＋" else read(a) - read(b)
            assert Fraction(question.answer) == expected, question
            checked[question.form] += 1
    assert min(checked["a+b"], checked["a-b"]) > 300


@pytest.mark.parametrize("name", arithmetic.LEVELS)
def test_answers_satisfy_their_problem(name: str) -> None:
    """By the problem's own numbers, put back into what was asked."""
    generator = arithmetic.Generator(arithmetic.LEVELS[name], 4)
    for _n in range(2000):
        question = generator.question(held_out=False)
        kind, *numbers = question.problem.split()
        a, b = map(Fraction, numbers)
        x = Fraction(question.answer)
        assert {"a+b": a + b - x, "a-b": a - b - x, "x+a=b": x + a - b, "x-a=b": x - a - b, "a-x=b": a - x - b}[
            kind
        ] == 0
        assert re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]*[1-9])?", question.answer), "canonical half-width digits"
        assert question.answer != "-0"
        for script in question.scripts:
            assert script in arithmetic.LEVELS[name].scripts


def test_the_question_shows_the_problems_numbers_in_its_scripts() -> None:
    generator = arithmetic.Generator(arithmetic.LEVELS["full"], 5)
    seen: Counter[str] = Counter()
    for _n in range(3000):
        question = generator.question(held_out=False)
        numbers = question.problem.split()[1:]
        spelled = {(s, n): numerals.SCRIPTS[s](n).lower() for s in question.scripts for n in numbers}
        shown = [key for key, text in spelled.items() if text in question.text.lower()]
        assert {n for _s, n in shown} == set(numbers), question
        seen.update((question.form, *question.scripts))
    assert set(seen) == set(arithmetic.FORMS) | set(numerals.SCRIPTS)


def test_full_level_covers_the_tutorials_ranges() -> None:
    generator = arithmetic.Generator(arithmetic.LEVELS["full"], 6)
    numbers = [arithmetic.plain(generator.number()) for _n in range(5000)]
    assert {len(n.lstrip("-").split(".")[0]) for n in numbers} == set(range(1, 13))
    assert {len(n.partition(".")[2]) for n in numbers} == set(range(7))
    assert any(n.startswith("-") for n in numbers)


def test_held_out_problems_never_occur_in_training_data() -> None:
    level = arithmetic.LEVELS["scripts"]
    held = {q.problem for seed in range(3) for q in arithmetic.evaluation(level, 500, seed)}
    generator = arithmetic.Generator(level, 7)
    trained = {generator.question(held_out=False).problem for _n in range(40_000)}
    assert len(held) > 400
    assert len(trained) > 10_000
    assert not held & trained
    assert 0.03 < len(held) / (len(held) + len(trained)) < 0.07


def test_the_split_sees_through_script_order_and_wording() -> None:
    generator = arithmetic.Generator(arithmetic.LEVELS["languages"], 8)
    groups: dict[tuple[object, ...], set[str]] = {}
    for _n in range(20_000):
        question = generator.question(held_out=False)
        kind, *numbers = question.problem.split()
        key = (kind, *sorted(numbers)) if kind == "a+b" else (kind, *numbers)
        groups.setdefault(key, set()).add(question.problem)
    assert all(len(problems) == 1 for problems in groups.values())


def test_evaluation_is_the_same_for_a_seed_and_has_no_repeats() -> None:
    level = arithmetic.LEVELS["basic"]
    first, again, other = (arithmetic.evaluation(level, 500, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len({q.text for q in first}) == 500
    assert all(arithmetic.is_held_out(q.problem) for q in first)


def test_more_held_out_questions_than_exist() -> None:
    tiny = arithmetic.Level("tiny", 3, {"half": 1}, {"a+b": 1, "a-b": 1}, {"symbols": 1})
    with pytest.raises(UserError, match=r"tiny has only \d+ .* -n"):
        arithmetic.evaluation(tiny, 500)


def test_unknown_level_lists_the_levels() -> None:
    with pytest.raises(UserError, match=r"'basics'.*basic, scripts"):
        arithmetic.find_level("basics")


def test_write_is_the_same_for_any_number_of_workers(tmp_path) -> None:
    level = arithmetic.LEVELS["equations"]
    calls: list[tuple[int, int]] = []
    size = arithmetic.write(
        tmp_path / "one.jsonl", level, 1200, seed=5, workers=1, progress=lambda *done: calls.append(done)
    )
    arithmetic.write(tmp_path / "two.jsonl", level, 1200, seed=5, workers=2)
    arithmetic.write(tmp_path / "other.jsonl", level, 1200, seed=6)
    one = (tmp_path / "one.jsonl").read_bytes()
    assert one == (tmp_path / "two.jsonl").read_bytes()
    assert one != (tmp_path / "other.jsonl").read_bytes()
    assert size == len(one)
    assert calls[-1] == (1200, 1200)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.jsonl", "other.jsonl", "two.jsonl"]

    lines = one.decode().splitlines()
    assert len(set(lines)) == 1200
    for line in lines[:50]:
        turns = json.loads(line)["text"].split("\n\n")
        assert 20 <= len(turns) <= 40
        assert all(turn.startswith("User: ") for turn in turns[::2])
        assert all(re.fullmatch("Assistant: -?[0-9]+", turn) for turn in turns[1::2])


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signal that a child can outlive")
def test_a_killed_writer_leaves_no_data_file(tmp_path) -> None:
    code = (
        "import sys; from rookery.data import arithmetic as a;"
        "a.write(sys.argv[1], a.LEVELS['basic'], 1_000_000, workers=1, progress=lambda d, t: print(d, flush=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "data.jsonl")], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "data.jsonl").exists()


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to one child on Windows")
def test_an_interrupted_writer_leaves_nothing_and_no_worker(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom rookery.data import arithmetic as a\n"
        "if __name__ == '__main__':\n"
        "    a.write(sys.argv[1], a.LEVELS['basic'], 10**6, workers=2, progress=lambda d, t: print(d, flush=True))\n",
        encoding="utf-8",
    )
    data = tmp_path / "data"
    data.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(script), str(data / "data.jsonl")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stdout
    process.stdout.readline()
    time.sleep(3)  # A worker that is still starting would be interrupted within Python's own imports.
    os.killpg(process.pid, signal.SIGINT)
    started = time.monotonic()
    _out, errors = process.communicate(timeout=30)
    assert time.monotonic() - started < 10
    assert errors.count("Traceback") == 1, "the parent's own KeyboardInterrupt and none of the workers'"
    assert list(data.iterdir()) == []
