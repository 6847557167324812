"""Question-and-answer training of the v5 line (`my_qa_mask`): every other sample comes from other data."""

from __future__ import annotations

from typing import Any

import numpy as np

from rookery.data.sampler import RandomSampler
from rookery.data.samples import Dataset

MARK = (187, 187, 34, 27)
"""A blank line and ``A:`` in the 20B tokenizer, for which the reference wrote this."""


class Mixture(Dataset):
    """Samples of even number, counted from 1, are random windows of other data; those of odd number are our own.

    Args:
        mixed: (tokens), the other data.
        place: of each window in them.
        answers_only: whether only the answers in our own samples train, which begin with the last token of `MARK` and
            end before token 0. A sample without an answer is replaced by a window of the other data.
        everything else: as in `Dataset`.
    """

    def __init__(self, *dataset: Any, mixed: np.ndarray, place: RandomSampler, answers_only: bool, **rest: Any) -> None:
        super().__init__(*dataset, **rest)
        self._mixed = mixed
        self._place = place
        self._answers_only = answers_only

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        number = index + 1
        if number % 2 == 0:
            return self._other(index)
        x, y = super().sample(number // 2 - 1)
        if not self._answers_only:
            return x, y
        counts = answers(x)
        return (x, np.where(counts, y, -100)) if counts.any() else self._other(index)

    def _other(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        first = self._place.offset(index)
        window = self._mixed[first : first + self.ctx_len + 1].astype(np.int64)
        return window[:-1], window[1:]


def answers(x: np.ndarray) -> np.ndarray:
    """Which places of the input (ctx_len) belong to an answer, and so train the token after them: bool (ctx_len)."""
    begins = np.zeros(len(x), bool)
    if len(x) >= len(MARK):
        begins[len(MARK) - 1 :] = (np.lib.stride_tricks.sliding_window_view(x, len(MARK)) == MARK).all(1)
    place = np.arange(len(x))
    begun = np.maximum.accumulate(np.where(begins, place, -1))
    ended = np.maximum.accumulate(np.where(x == 0, place, -1))
    return begun > ended
