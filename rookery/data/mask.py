"""Which targets of a window count.

A mask is a function of a window of ids, int64 (n + 1), and of how many of them are real (the rest is padding); it gives
bool (n), whether target i, which is ``window[i + 1]``, is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numba import njit

from rookery.errors import UserError
from rookery.i18n import _
from rookery.tokenizer import Tokenizer
from rookery.tokenizer.chat import MARKS

Mask = Callable[[np.ndarray, int], np.ndarray]


def make_mask(kind: str, tokenizer: Tokenizer, mask_id: Mapping[str, str] | None = None) -> Mask:
    """The mask that `loss_mask` names.

    * "none", "pad": everything that is not padding.
    * "qa": from each ``Assistant:`` on, that mark included, until the next ``User:``; when the window has no
      ``Assistant:``, everything but its last target. RWKV-PEFT's definition, with its marks found as token ids.
    * "se": the same between the marks of `mask_id`: ``mask1`` begins, ``mask0`` ends.
    * "answer": what an assistant says, from after its mark up to and including the blank line or the end of the
      document that ends it; never a mark, and nothing before the first mark of the window.

    Raises:
        UserError: marks that are missing or not in the vocabulary.
    """
    if kind == "qa":
        return _held(tokenizer, MARKS["user"], MARKS["assistant"], skip=False)
    if kind == "se":
        marks = mask_id or {}
        if not marks.get("mask0") or not marks.get("mask1"):
            example = '{"mask0": "User:", "mask1": "Assistant:"}'
            raise UserError(_("loss_mask se needs the marks in mask_id, for example {example}", example=example))
        return _held(tokenizer, marks["mask0"], marks["mask1"], skip=True)
    if kind == "answer":
        return _answers(tokenizer)
    return _padding


def _padding(window: np.ndarray, real: int) -> np.ndarray:
    return np.arange(1, len(window)) < real


def _held(tokenizer: Tokenizer, end: str, begin: str, *, skip: bool) -> Mask:
    try:
        marks = [np.array(tokenizer.encode(mark), np.int64) for mark in (end, begin)]
    except UserError as error:
        raise UserError(_("the marks of loss_mask do not fit the vocabulary: {reason}", reason=error)) from error
    return lambda window, real: _walk_marks(window, real, marks[0], marks[1], skip)


@njit(cache=True)
def _walk_marks(window, real, end, begin, skip):
    """A value that becomes 0 at each `end` and 1 at each `begin` and is held; without any 1, everything real counts.

    With `skip`, the ids of a mark found are stepped over, so that no mark can begin inside another.
    """
    value = np.zeros(window.size, np.bool_)
    held = False
    position = 0
    while position < real:
        length = 0
        if _found(window, real, position, end):
            held = False
            length = end.size
        elif _found(window, real, position, begin):
            held = True
            length = begin.size
        step = length if skip and length else 1
        value[position : min(position + step, real)] = held
        position += step
    if not value.any():
        value[: real - 1] = True
    return value[1:]


@njit(cache=True)
def _found(window, real, position, mark):
    if position + mark.size > real:
        return False
    return np.array_equal(window[position : position + mark.size], mark)


def _answers(tokenizer: Tokenizer) -> Mask:
    data, offsets = tokenizer.token_bytes()
    names = [MARKS["assistant"], MARKS["user"], MARKS["system"]]
    marks = np.zeros((len(names), max(map(len, names)) + 1), np.uint8)
    for row, name in zip(marks, names, strict=True):
        row[: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    end = -1 if tokenizer.end_of_document is None else tokenizer.end_of_document
    return lambda window, real: _walk_answers(window, real, data, offsets, marks, end)


@njit(cache=True)
def _walk_answers(window, real, data, offsets, marks, end_of_document):
    """A token counts when its first byte belongs to an answer. `marks` are zero-padded rows, the assistant's first.

    It walks over bytes, because how a mark and the text around it fall into tokens depends on that text. A mark stands
    at the beginning of a document or after a blank line; before the window, either may have been.
    """
    counts = np.zeros(window.size, np.bool_)
    answering = False
    newlines = 2
    mark = -1
    matched = 0
    mark_token = 0
    for i in range(real):
        token = window[i]
        counts[i] = answering
        if token == end_of_document:
            answering = False
            newlines = 2
            mark = -1
            continue
        for k in range(offsets[token], offsets[token + 1]):
            byte = data[k]
            if mark < 0 and newlines >= 2:
                for row in range(marks.shape[0]):
                    if marks[row, 0] == byte:
                        mark = row
                        matched = 0
                        mark_token = i if k == offsets[token] else i + 1
            if mark >= 0:
                if marks[mark, matched] == byte:
                    matched += 1
                    if marks[mark, matched] == 0:
                        counts[mark_token : i + 1] = False
                        answering = mark == 0
                        mark = -1
                else:
                    mark = -1
            newlines = newlines + 1 if byte == 10 else 0
    if mark >= 0:
        # The window ends within what may be a mark.
        counts[mark_token:] = False
    return counts[1:]
