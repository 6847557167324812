"""Which tokens of a conversation are trained: those a model generates when it is prompted with what comes before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rookery.data.rows import Document, RowReader
from rookery.data.tokenise import encode
from rookery.errors import UserError
from rookery.tokenizer import Character, World, chat
from rookery.tokenizer.chat import Template

WORLD = World()

texts = st.text(alphabet=st.sampled_from("a b1:.<>\n\"'`“好。，🐼é\u200d👩"), max_size=12)
answers = st.builds(
    lambda text, thoughts: {"role": "assistant", "content": text, "reasoning": thoughts},
    texts,
    st.one_of(st.just(""), texts),
)
others = st.builds(
    lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "system", "tool"]), texts
)
conversations = st.lists(st.one_of(answers, others), min_size=1, max_size=7)


@settings(deadline=None, max_examples=100)
@given(st.lists(conversations, min_size=1, max_size=3), st.sampled_from(["world", "g1"]), st.booleans())
def test_trained_tokens_are_what_follows_each_prompt(
    rows: list[list[dict[str, str]]], template: Template, characters: bool
) -> None:
    reader = RowReader("messages", template)
    documents = [reader.read({"messages": row}) for row in rows]
    joined = "".join(document.text.decode() for document in documents)
    tokenizer = Character.build(joined, documents=True) if characters else WORLD
    tokens, sizes, said = encode(documents, tokenizer)
    assert said is not None
    assert (len(tokens), tokens.dtype) == (sizes.sum(), tokenizer.dtype)
    assert tokens.tolist() == tokenizer.encode_documents([document.text for document in documents])[0].tolist()

    start = 0
    for row, size in zip(rows, sizes.tolist(), strict=True):
        own, flags = tokens[start : start + size].tolist(), said[start : start + size].tolist()
        start += size
        messages = reader.messages({"messages": row})
        expected = [False] * size
        for place, message in enumerate(messages):
            if message.role != "assistant" or not chat.body(message, template):
                continue
            begin = len(tokenizer.encode(chat.prompt(messages[:place], template=template)))
            last = place == len(messages) - 1
            whole = chat.document(messages[: place + 1], template) + ("" if last else chat.SEPARATOR)
            end = size if last else len(tokenizer.encode(whole))
            # With the next mark, the blank line may fall into another token; the one it begins in is said.
            while not last and tokenizer.decode_bytes(own[:end]) != whole.encode():
                end += 1
            expected[begin:end] = [True] * (end - begin)
        assert flags == expected


def test_the_end_of_a_document_is_said_by_whoever_spoke_last() -> None:
    reader = RowReader("messages")
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    for row, said in (([question, answer], True), ([question, answer, question], False), ([question], False)):
        assert encode([reader.read({"messages": row})], WORLD)[2][-1] == said  # type: ignore[index]


def test_a_vocabulary_that_cannot_hold_a_conversation() -> None:
    document = Document(b"User: x\0\n\nAssistant: y", (19, 21))
    with pytest.raises(UserError, match=r"U\+0000, which ends documents"):
        encode([document], Character.build("User: xAsitan\ny", documents=True))
    with pytest.raises(UserError, match="has no end of document"):
        encode([Document(b"User: x", ())], Character.build("User: xAsitan\ny"))
    with pytest.raises(UserError, match="'y'"):
        encode([document], Character.build("User: xAsitan\n", documents=True))
    tokens, sizes, said = encode([document], WORLD)
    assert WORLD.decode_bytes(tokens.tolist()) == document.text
    assert said is not None
    assert np.count_nonzero(said) == 2
    assert sizes.tolist() == [len(tokens)]
