"""Scores of the arithmetic suite and of a text, by models whose answers are known."""

import json
import math

import pytest
import torch

from rookery.cli import run
from rookery.data.arithmetic import LEVELS, evaluation
from rookery.errors import UserError
from rookery.eval import arithmetic, perplexity, write_report
from rookery.eval.arithmetic import Answered
from rookery.eval.plot import draw_loss, smoothed
from rookery.formats import write_pth
from rookery.infer import Sampling, generate
from rookery.models import ModelShape, create, initialise
from rookery.tokenizer import Character, World

LEVEL = LEVELS["basic"]
VOCABULARY = Character.build("User: Assistant:\n 0123456789+-=?一二三四五六七八九十零", documents=True)


@pytest.fixture(scope="module")
def model():
    ranks = dict.fromkeys("wavg", 8)
    model = create(ModelShape("x070", 2, 32, VOCABULARY.vocab_size, 16, 32, 128, ranks))
    initialise(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        # A model that says something before it stops.
        model.head.weight[VOCABULARY.encode("\n \0")] = 0
    # In fp64, so that the rounding of a larger batch cannot tip a draw.
    return model.double()


def answered(wrong: int) -> list[Answered]:
    """Sixty questions, the first of them answered wrongly."""
    questions = evaluation(LEVEL, 60)
    return [Answered(q, "no" if i < wrong else q.answer) for i, q in enumerate(questions)]


@pytest.mark.parametrize(("wrong", "shown_wrong"), [(0, 0), (3, 3), (30, 5), (57, 7), (60, 10)])
def test_the_report_counts_and_samples_right_and_wrong(wrong: int, shown_wrong: int) -> None:
    report = arithmetic.Result("basic", 0, answered(wrong)).report()
    assert report["exact"] == round(1 - wrong / 60, 4)
    assert report["n"] == 60
    assert report["level"] == "basic"
    assert len(report["samples"]) == 10
    assert sum(not sample["right"] for sample in report["samples"]) == shown_wrong
    for sample in report["samples"]:
        assert sample["right"] == (sample["assistant"] == sample["expected"])


def test_shares_by_form_and_script() -> None:
    answers = answered(20)
    report = arithmetic.Result("basic", 0, answers).report()
    for form in ("a+b", "a-b"):
        of_form = [a.right for a in answers if a.question.form == form]
        assert report["by_form"][form] == round(sum(of_form) / len(of_form), 4)
    for script in ("half", "chinese"):
        of_script = [a.right for a in answers if script in a.question.scripts]
        assert report["by_script"][script] == round(sum(of_script) / len(of_script), 4)


@pytest.mark.parametrize(
    ("said", "right"), [("-20", True), ("-20.0", False), ("20", False), ("", False), ("２０", False)]
)
def test_only_the_exact_answer_is_right(said: str, right: bool) -> None:
    question = next(q for q in evaluation(LEVEL, 60) if q.answer == "-20")
    assert Answered(question, said).right == right


def test_each_question_is_asked_alone_with_the_chat_template(model) -> None:
    calls: list[tuple[int, int]] = []
    result = arithmetic.evaluate(model, VOCABULARY, LEVEL, n=30, seed=2, progress=lambda *done: calls.append(done))
    questions = evaluation(LEVEL, 30, 2)
    assert [a.question for a in result.answers] == questions
    assert calls[-1] == (30, 30)
    sampling = Sampling(temperature=0, alpha_presence=0, alpha_frequency=0, stop=("\n\n",), max_tokens=8)
    for answer in result.answers:
        prompt = VOCABULARY.encode(f"User: {answer.question.text}\n\nAssistant:")
        alone = "".join(generate(model, VOCABULARY, prompt, sampling)).strip()
        assert alone.startswith(answer.said)
    assert any(answer.said for answer in result.answers)


def test_the_loss_of_a_text_is_the_mean_over_its_tokens(model) -> None:
    text = "User: 1+一=?\n\nAssistant: 2"
    result = perplexity.measure(model, VOCABULARY, text)
    ids = torch.tensor([[VOCABULARY.end_of_document, *VOCABULARY.encode(text)]])
    with torch.inference_mode():
        logits, _state = model(ids)
    likelihoods = logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])
    assert result.loss == pytest.approx(-float(likelihoods.mean()), rel=1e-5)
    assert result.tokens == len(text)
    assert result.text_bytes == len(text.encode())
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(-float(likelihoods.sum()) / math.log(2) / len(text.encode()), rel=1e-5)


def test_a_text_read_in_chunks_scores_as_one_pass(model, monkeypatch) -> None:
    text = "12+34=46\n一二三" * 30
    whole = perplexity.measure(model, VOCABULARY, text)
    monkeypatch.setattr(perplexity, "CHUNK", 17)
    chunks = perplexity.measure(model, VOCABULARY, text)
    assert chunks.loss == pytest.approx(whole.loss, rel=1e-5)
    assert chunks.tokens == whole.tokens
    assert whole.text_bytes == len(text.encode()) > whole.tokens


def test_without_an_end_of_document_the_first_token_is_not_predicted(model) -> None:
    vocabulary = Character.build("ab")
    assert perplexity.measure(model, vocabulary, "abba").tokens == 3
    with pytest.raises(UserError, match="too short"):
        perplexity.measure(model, vocabulary, "a")


def test_texts_that_cannot_be_read(model, tmp_path) -> None:
    with pytest.raises(UserError, match=r"absent\.txt"):
        perplexity.measure_file(model, VOCABULARY, tmp_path / "absent.txt")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.txt"):
        perplexity.measure_file(model, VOCABULARY, binary)


def test_the_report_is_replaced_whole(tmp_path) -> None:
    file = tmp_path / "new" / "eval.json"
    write_report(file, {"arithmetic": {"exact": 0.5, "samples": ["五"]}})
    write_report(file, {"arithmetic": {"exact": 0.97}})
    assert json.loads(file.read_text(encoding="utf-8")) == {"arithmetic": {"exact": 0.97}}
    assert [f.name for f in file.parent.iterdir()] == ["eval.json"]
    with pytest.raises(UserError, match="Cannot write"):
        write_report(file / "below" / "eval.json", {})


def test_the_picture_is_a_png_of_the_run(tmp_path) -> None:
    lines = [{"step": i, "loss": 3.0 / (i + 1), "lr": 1e-3, "tokens": 100 * i} for i in range(1, 300)]
    lines.insert(7, {"step": 7, "val_loss": 2.0})
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    draw_loss(metrics, tmp_path / "loss.png", "a title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_smoothing_keeps_a_line_and_dampens_noise() -> None:
    assert smoothed([2.0 * i for i in range(500)]) == pytest.approx([2.0 * i for i in range(500)])
    noisy = smoothed([(-1.0) ** i for i in range(1000)])
    assert max(map(abs, noisy[50:-50])) < 0.1


def test_world_is_measured_in_its_own_tokens() -> None:
    world = World()
    model = create(ModelShape("x070", 1, 32, 65536, 32, 32, 128, dict.fromkeys("wavg", 8)))
    initialise(model, 1)
    text = "Hello 世界, hello world. "
    result = perplexity.measure(model, world, text)
    assert result.tokens == len(world.encode(text))
    assert result.text_bytes == len(text.encode())


def test_results_lie_beside_the_run(model, tmp_path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    VOCABULARY.save(folder / "vocab.json")
    write_pth(folder / "rwkv-final.pth", {name: tensor.float() for name, tensor in model.state_dict().items()})
    text = tmp_path / "text.txt"
    text.write_text("User: 1+1=?", encoding="utf-8")
    before = sorted(folder.iterdir())
    assert run(["eval", str(folder / "rwkv-final.pth"), "--text", str(text)]) == 0
    assert run(["eval", str(folder), "--text", str(text)]) == 0
    assert sorted(folder.iterdir()) == before, "neither a file nor a folder of weights is a run"
    (folder / "config.toml").write_text("[model]\n", encoding="utf-8")
    assert run(["eval", str(folder), "--text", str(text)]) == 0
    [file] = folder.glob("eval-*.json")
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["text"]["file"] == str(text)
    assert results["model"]["files"] == [str(folder / "rwkv-final.pth")]
    assert results["model"]["measured"] > "2026"


def test_a_place_that_cannot_be_written_is_told_first(model, tmp_path, capsys) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    for place in (tmp_path / "taken" / "eval.json", tmp_path):
        assert run(["eval", str(tmp_path / "absent.pth"), "--text", "absent.txt", "-o", str(place)]) == 2
        assert f"Cannot write {place}: " in capsys.readouterr().err


def test_what_is_no_number_is_null(tmp_path) -> None:
    lost = perplexity.Result(loss=800.0, tokens=2, text_bytes=2)
    assert lost.perplexity == math.inf
    assert math.isnan(perplexity.Result(loss=math.nan, tokens=2, text_bytes=2).perplexity)
    write_report(tmp_path / "eval.json", {"text": lost.report()})
    text = (tmp_path / "eval.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail)["text"]["perplexity"] is None
