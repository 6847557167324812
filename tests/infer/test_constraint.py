"""Answers of a given form, from a model that has no idea of it."""

import json
import re

import pytest

from rookery.errors import UserError
from rookery.infer import Constraint, Engine, Request, Sampling
from rookery.tokenizer import Character

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "likes": {"type": "array", "items": {"enum": ["cats", "狗"]}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


def answer(model, tokenizer, constraint: Constraint, **settings):
    engine = Engine(model, tokenizer)
    sampling = Sampling(temperature=2.0, top_p=1.0, max_tokens=200, token_stop=(0,), **settings)
    handle = engine.submit(Request(tokenizer.encode("User"), sampling, constraint=constraint))
    while not handle.finish:
        engine.turn()
    return handle.result()


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_is_kept(model, world, seed) -> None:
    got = answer(model, world, Constraint.json_schema(SCHEMA), seed=seed)
    value = json.loads(got.text)
    assert got.finish == "stop"
    assert set(value) == {"name", "age", "likes"}
    assert len(value["name"]) <= 12
    assert 0 <= value["age"] <= 130
    assert set(value["likes"]) <= {"cats", "狗"}


def test_an_expression_and_a_grammar_are_kept(model, world) -> None:
    got = answer(model, world, Constraint.regex(r"[0-9]{3}-[一二三]{2}"), seed=1)
    assert re.fullmatch(r"[0-9]{3}-[一二三]{2}", got.text)
    for grammar in ('start: "(" start ")" | "x"', 'root ::= "(" root ")" | "x"'):
        got = answer(model, world, Constraint.rules(grammar), seed=1)
        assert re.fullmatch(r"\(*x\)*", got.text)
        assert got.text.count("(") == got.text.count(")")
    choices = ['a "quoted" \\ one', "是|否", "(x)"]
    assert {answer(model, world, Constraint.choice(choices), seed=seed).text for seed in range(9)} == set(choices)


def test_a_vocabulary_without_an_end_is_served(model) -> None:
    tokenizer = Character(list("User0123456789-"))
    got = answer(model, tokenizer, Constraint.regex("[0-9]{2}-[0-9]"), seed=2)
    assert re.fullmatch("[0-9]{2}-[0-9]", got.text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constraint.json_schema({"type": "nonsense"}),
        lambda: Constraint.json_schema("{"),
        lambda: Constraint.regex("(("),
        lambda: Constraint.rules("start: absent"),
        lambda: Constraint.rules("root ::= absent"),
        lambda: Constraint.rules('root ::= ("x"'),
    ],
)
def test_an_impossible_form_is_refused_when_it_is_asked_for(model, world, make) -> None:
    with pytest.raises(UserError, match="cannot be used"):
        Engine(model, world).submit(Request([1], constraint=make()))
