"""The tasks of lm-eval on our models: each number is the one that the model gives alone; files of tasks, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rookery.cli import run
from rookery.data import BinIdxWriter
from rookery.errors import UserError
from rookery.eval import lm_eval_tasks, perplexity
from rookery.eval.lm_eval_tasks import RookeryLM
from rookery.formats import write_pth
from rookery.infer import Sampling, generate
from rookery.models import Model, ModelShape, create, initialise
from rookery.tokenizer import Character, save_beside

VOCABULARY = Character.build("User: Assistant:\n 0123456789+-=?", documents=True)


def small_model() -> Model:
    model = create(ModelShape("x070", 2, 32, VOCABULARY.vocab_size, 16, 32, 128, dict.fromkeys("wavg", 8)))
    initialise(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Model:
    # In fp64, so that rounding cannot tip which token is the likeliest.
    return small_model().double()


def asked(*arguments: object) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


@torch.inference_mode()
def alone(model: Model, context: str, continuation: str) -> tuple[float, bool]:
    before = [VOCABULARY.end_of_document, *VOCABULARY.encode(context)]
    ids = torch.tensor([before + VOCABULARY.encode(continuation)])
    logits, _state = model(ids)
    predicted = logits[0, len(before) - 1 : -1]
    targets = ids[0, len(before) :]
    likelihood = predicted.log_softmax(-1).gather(-1, targets[:, None]).sum()
    return float(likelihood), bool((predicted.argmax(-1) == targets).all())


PAIRS = [
    ("1+1=", "2"),
    ("1+1=", "3"),
    ("1+1=", "1234567"),
    ("User: 12-3?\n\nAssistant:", " 9"),
    ("", "User: 1"),
    ("  ", "7"),
    ("1+1= ", "2"),
    ("4", ""),
    *((f"{i}+", f"{i * 7}=") for i in range(40)),
]


def test_each_continuation_scores_as_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    lm = RookeryLM(model, VOCABULARY, lambda *done: calls.append(done))
    for tokens in (lm_eval_tasks.TOKENS, 9):
        monkeypatch.setattr(lm_eval_tasks, "TOKENS", tokens)
        scores = lm.loglikelihood([asked(*pair) for pair in PAIRS])
        for (context, continuation), (likelihood, greedy) in zip(PAIRS, scores, strict=True):
            # lm-eval counts spaces before the continuation as part of it.
            spaces = context[len(context.rstrip()) :]
            expected = alone(model, context.rstrip(), spaces + continuation)
            assert (pytest.approx(likelihood, rel=1e-6), greedy) == expected, (context, continuation)
        assert calls[-1] == (len(PAIRS), len(PAIRS))


def test_the_likeliest_continuation_is_known_as_such(model: Model) -> None:
    said = RookeryLM(model, VOCABULARY).generate_until([asked("1+1=", {"max_gen_toks": 5})])[0]
    assert len(said) == 5
    other = said[:-1] + ("1" if said[-1] != "1" else "2")
    scores = RookeryLM(model, VOCABULARY).loglikelihood([asked("1+1=", said), asked("1+1=", other)])
    assert [greedy for _likelihood, greedy in scores] == [True, False]


def test_texts_of_any_length_are_read_whole(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "CHUNK", 32)
    texts = ["1", "12+34=46", "1+2=3 " * 30, "9" * 31, "5-4=1"]
    found = RookeryLM(model, VOCABULARY).loglikelihood_rolling([asked(text) for text in texts])
    for text, likelihood in zip(texts, found, strict=True):
        assert likelihood == pytest.approx(alone(model, "", text)[0], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({"until": ["\n"], "max_gen_toks": 12}, {"stop": ("\n",), "max_tokens": 12}),
        (
            {"until": "3", "max_new_tokens": 40, "do_sample": False, "temperature": 1.0},
            {"stop": ("3",), "max_tokens": 40},
        ),
        ({}, {"max_tokens": 256}),
    ],
)
def test_answers_are_those_of_the_model(model: Model, options: dict, sampling: dict) -> None:
    contexts = ["1+1=", "User: 2\n\nAssistant:", "", "7-"]
    said = RookeryLM(model, VOCABULARY).generate_until([asked(context, options) for context in contexts])
    likeliest = Sampling(
        temperature=0, alpha_presence=0, alpha_frequency=0, token_stop=(VOCABULARY.end_of_document,), **sampling
    )
    for context, text in zip(contexts, said, strict=True):
        ids = [VOCABULARY.end_of_document, *VOCABULARY.encode(context)]
        assert text == "".join(generate(model, VOCABULARY, ids, likeliest))


def test_a_vocabulary_without_an_end_of_document_is_refused(model: Model) -> None:
    with pytest.raises(UserError, match="no end of document"):
        RookeryLM(model, Character.build("ab"))


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
KINDS = {
    "choose": 'doc_to_choice: "{{choices}}"\ndoc_to_target: right\nmetric_list:\n  - metric: acc\n',
    "answer": (
        'doc_to_target: "{{answer}}"\ngeneration_kwargs:\n  until: ["="]\n  max_gen_toks: 4\n'
        "metric_list:\n  - metric: exact_match\n"
    ),
    "read": 'doc_to_target: "{{question}}"\nmetric_list:\n  - metric: bits_per_byte\n',
}
OUTPUT_TYPES = {"choose": "multiple_choice", "answer": "generate_until", "read": "loglikelihood_rolling"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its vocabulary, and a file for each kind of task, on questions that it answers as noted."""
    folder = tmp_path_factory.mktemp("tasks")
    model = small_model()
    write_pth(folder / "model.pth", model.state_dict())
    save_beside(VOCABULARY, str(folder / "vocab"))
    lines = []
    for i in range(6):
        question = f"{i}+{i}="
        said = RookeryLM(model.double(), VOCABULARY).generate_until(
            [asked(question, {"until": ["="], "max_gen_toks": 4})]
        )[0]
        scores = [alone(model, question, f" {choice}")[0] for choice in range(3)]
        best = scores.index(max(scores))
        lines.append(
            {
                "question": question,
                "choices": ["0", "1", "2"],
                "right": best if i < 4 else (best + 1) % 3,
                "answer": said if i < 3 else "00000",
            }
        )
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, rest in KINDS.items():
        head = TASK.format(name=name, data=data.as_posix(), kind=OUTPUT_TYPES[name])
        (folder / f"{name}.yaml").write_text(head + rest, encoding="utf-8")
    return folder


def test_task_files_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, as lm-eval and what it brings warn of much."""
    tasks = ["--tasks", f"{folder / 'choose.yaml'},{folder / 'answer.yaml'}", "--tasks", str(folder / "read.yaml")]
    words = ["eval", str(folder / "model.pth"), *tasks, "-o", str(tmp_path / "eval.json")]
    done = subprocess.run(
        [sys.executable, "-m", "rookery", "--lang", "en", *words],
        capture_output=True, encoding="utf-8", errors="replace", env=os.environ | {"HF_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))["tasks"]["results"]
    assert results["choose"]["acc"] == pytest.approx(4 / 6)
    assert results["answer"]["exact_match"] == pytest.approx(3 / 6)
    assert results["choose"]["n"] == results["answer"]["n"] == 6
    text = "".join(f"{i}+{i}=" for i in range(6))
    bits = [-alone(small_model(), "", f"{i}+{i}=")[0] / torch.tensor(2.0).log().item() for i in range(6)]
    assert results["read"]["bits_per_byte"] == pytest.approx(sum(bits) / len(text), rel=1e-4)
    assert "acc" in done.stdout
    assert "0.6667" in done.stdout


def test_tasks_that_cannot_be_loaded(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(TASK.format(name="broken", data=tmp_path / "none.jsonl", kind="multiple_choice"))
    for name, said in ((tmp_path / "absent.yaml", "does not exist"), (broken, "cannot be loaded")):
        assert run(["eval", str(folder / "model.pth"), "--tasks", str(name)]) == 2
        told = capsys.readouterr().err
        assert said in told
        assert name.name in told
        assert "Traceback" not in told


def test_without_lm_eval_one_sentence_says_how_to_get_it(folder: Path) -> None:
    code = (
        "import sys; sys.modules['lm_eval'] = None; from rookery.cli import run;"
        "sys.exit(run(['--lang', 'en', 'eval', sys.argv[1], '--tasks', 'arc_easy']))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder / "model.pth")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "Tasks need the package lm-eval: python -m pip install 'rookery[eval]'\n"


def test_binidx_documents_are_read_each_alone(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "CHUNK", 24)
    texts = ["1+1=2", "12-3=9\n" * 9, "7", "User: 2"]
    with BinIdxWriter(tmp_path / "data", np.uint16, VOCABULARY) as writer:
        for text in texts:
            writer.add(np.array([*VOCABULARY.encode(text), VOCABULARY.end_of_document], np.uint16))
    for name in ("data", "data.bin", "data.idx"):
        found = perplexity.measure_file(model, VOCABULARY, tmp_path / name)
        assert found.loss * found.tokens == pytest.approx(-sum(alone(model, "", text)[0] for text in texts), rel=1e-6)
        assert found.tokens == found.text_bytes == sum(map(len, texts))
        assert found.documents == 4
    done: list[tuple[int, int]] = []
    first = perplexity.measure_file(
        model, VOCABULARY, tmp_path / "data", limit=2, progress=lambda *tokens: done.append(tokens)
    )
    assert first.documents == 2
    assert first.loss * first.tokens == pytest.approx(-sum(alone(model, "", text)[0] for text in texts[:2]), rel=1e-6)
    assert done[-1] == (first.tokens, first.tokens + 2)
    with pytest.raises(UserError, match="another tokenizer"):
        perplexity.measure_file(model, Character.build("12", documents=True), tmp_path / "data")


def test_solved_examples_chat_and_limit(folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the model: questions as a user's, after solved ones, and only so many."""
    seen: set[str] = set()
    encode = RookeryLM.tok_encode

    def listening(lm: RookeryLM, string: str, *rest: object) -> list[int]:
        seen.add(string)
        return encode(lm, string, *rest)

    monkeypatch.setattr(RookeryLM, "tok_encode", listening)
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    task = (folder / "answer.yaml").read_text(encoding="utf-8") + "fewshot_split: test\n"
    (folder / "shown.yaml").write_text(task, encoding="utf-8")
    found = lm_eval_tasks.evaluate(model, VOCABULARY, [str(folder / "shown.yaml")], few_shot=1, limit=2, as_chat=True)
    assert found["results"]["answer"] | {"exact_match": 0, "exact_match_stderr": 0} == {
        "n": 2, "few_shot": 1, "version": "Yaml", "exact_match": 0, "exact_match_stderr": 0,
    }  # fmt: skip
    assert len(seen) == 2
    for prompt in seen:
        assert prompt.count("User: ") == 2
        assert prompt.endswith("=\n\nAssistant:")
