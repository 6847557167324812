"""Question-and-answer training of the v5 line (`my_qa_mask`): every other sample comes from other data."""

from __future__ import annotations

import numpy as np

from rookery.data.sampler import RandomSampler
from rookery.data.samples import Sample, Samples

MARK = (187, 187, 34, 27)
"""A blank line and ``A:`` in the 20B tokenizer, for which the reference wrote this."""


class QuestionMixture:
    """Samples of even number, counted from 1, are random windows of other data; those of odd number are our own.

    Args:
        own: our samples.
        mixed: (tokens), the other data.
        place: of each window in them.
        ctx_len: tokens of a window.
        answers_only: whether only the answers in our own samples train, which begin with the last token of `MARK` and
            end before token 0. A sample without an answer is replaced by a window of the other data.
    """

    def __init__(
        self, own: Samples, mixed: np.ndarray, place: RandomSampler, ctx_len: int, *, answers_only: bool
    ) -> None:
        self._own = own
        self._mixed = mixed
        self._place = place
        self._ctx_len = ctx_len
        self._answers_only = answers_only
        self.name = own.name
        self.period = own.period

    def sample(self, index: int) -> Sample:
        number = index + 1
        if number % 2 == 0:
            return self._other(index)
        sample = self._own.sample(number // 2 - 1)
        if not self._answers_only:
            return sample
        counts = answers(sample.x)
        return sample._replace(y=np.where(counts, sample.y, -100)) if counts.any() else self._other(index)

    def _other(self, index: int) -> Sample:
        first = self._place.offset(index)
        window = self._mixed[first : first + self._ctx_len + 1].astype(np.int64)
        return Sample(window[:-1], window[1:])


def answers(x: np.ndarray) -> np.ndarray:
    """Which places of the input (ctx_len) belong to an answer, and so train the token after them: bool (ctx_len)."""
    begins = np.zeros(len(x), bool)
    if len(x) >= len(MARK):
        begins[len(MARK) - 1 :] = (np.lib.stride_tricks.sliding_window_view(x, len(MARK)) == MARK).all(1)
    place = np.arange(len(x))
    begun = np.maximum.accumulate(np.where(begins, place, -1))
    ended = np.maximum.accumulate(np.where(x == 0, place, -1))
    return begun > ended
