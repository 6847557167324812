"""Choosing the next token, as the `rwkv` package defines it (PIPELINE.sample_logits and PIPELINE.generate)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rookery.errors import UserError
from rookery.i18n import _

UNCOUNTED = " \t0123456789"
"""Tokens whose text lies inside this string are not counted by the frequency penalty."""

ENOUGH = 1024
"""Tokens among which the cut is looked for first."""


class NoNumbers(UserError):
    """Logits are NaN or infinite."""

    def __init__(self) -> None:
        super().__init__(
            _(
                "The model answers with NaN or infinity instead of numbers: its weights, or a state or adapter, hold "
                "such."
            )
        )


def check_numbers(logits: Tensor) -> None:
    """Refuse logits from which nothing can be drawn, or what they are computed of. A logit of minus infinity is that of
    a token that is never drawn.

    Raises:
        NoNumbers: some are NaN or infinite.
    """
    # The sum, which takes a quarter of the time, is finite in nearly all cases.
    if not logits.sum().isfinite() and not logits.max().isfinite():
        raise NoNumbers


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn and where it ends. The defaults are the `rwkv` package's.

    Attributes:
        temperature: flattens (> 1) or sharpens (< 1) what `top_p` and `top_k` left; 0 takes the likeliest token.
        top_p: keeps the likeliest tokens until their probability reaches this; 1 keeps all.
        top_k: keeps at most this many tokens; 0 keeps all.
        min_p: drops tokens less likely than this share of the likeliest one's probability; 0 keeps all.
        alpha_presence: taken off the logit of every token seen so far.
        alpha_frequency: taken off once more for each time it was seen.
        alpha_decay: factor by which the counts fade at each token.
        logit_bias: (token, amount) pairs, each amount added to the token's logit.
        token_ban: tokens never chosen.
        token_stop: tokens that end the answer and are not part of it.
        stop: texts that end the answer and are not part of it.
        max_tokens: longest answer.
        seed: seed of the draws; None draws anew each time.
    """

    temperature: float = 1.0
    top_p: float = 0.85
    top_k: int = 0
    min_p: float = 0.0
    alpha_presence: float = 0.2
    alpha_frequency: float = 0.2
    alpha_decay: float = 0.996
    logit_bias: tuple[tuple[int, float], ...] = ()
    token_ban: tuple[int, ...] = ()
    token_stop: tuple[int, ...] = (0,)
    stop: tuple[str, ...] = ()
    max_tokens: int = 512
    seed: int | None = None

    def __post_init__(self) -> None:
        limits = {
            "temperature": (self.temperature, 0.0, float("inf")),
            "top_p": (self.top_p, 0.0, 1.0),
            "top_k": (self.top_k, 0, float("inf")),
            "min_p": (self.min_p, 0.0, 1.0),
            "alpha_decay": (self.alpha_decay, 0.0, 1.0),
            "max_tokens": (self.max_tokens, 1, float("inf")),
        }
        for name, (value, least, most) in limits.items():
            if not least <= value <= most:
                raise UserError(
                    _(
                        "{name} is {value}; it must lie from {least} to {most}.",
                        name=name,
                        value=value,
                        least=least,
                        most=most,
                    )
                )

    @property
    def greedy(self) -> bool:
        """Whether each token is simply the one with the largest logit."""
        return self.temperature == 0 and not (self.penalised or self.token_ban or self.logit_bias)

    @property
    def penalised(self) -> bool:
        """Whether tokens seen before lose some of their logit."""
        return self.alpha_presence != 0 or self.alpha_frequency != 0


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> Tensor:
    """The distribution that a token is drawn from.

    `top_p`, `top_k` and `min_p` cut the untempered distribution: tokens less likely than the one at which the
    cumulative probability reaches `top_p` are dropped (equals stay), then all but the `top_k` likeliest, then those
    below `min_p` times the largest probability; what is left is raised to 1/temperature. A temperature of 0 means the
    likeliest token alone. `top_p` of 1 is off, where the `rwkv` package turns greedy whenever its fp32 sum falls short
    of 1.

    Args:
        logits: `(..., V)`, any float dtype.

    Returns:
        `(..., V)` fp32, each row summing to 1.
    """
    if temperature == 0:
        temperature, top_p = 1.0, 0.0
    probs = logits.float().softmax(-1)
    vocab = probs.shape[-1]
    if top_p < 1 or 0 < top_k < vocab:
        ordered, ids = _likeliest(probs, top_p, top_k)
        reached = ordered.cumsum(-1) >= top_p
        last = torch.where(reached.any(-1), reached.int().argmax(-1), ordered.shape[-1] - 1)
        cutoff = ordered.gather(-1, last.unsqueeze(-1))
        if 0 < top_k < vocab and ids is not None:
            kept = ids[..., :top_k]
            probs = torch.zeros_like(probs).scatter(-1, kept, probs.gather(-1, kept))
        probs = torch.where(probs < cutoff, 0.0, probs)
    if min_p > 0:
        probs = torch.where(probs < min_p * probs.amax(-1, keepdim=True), 0.0, probs)
    if temperature != 1:
        # Over the largest first, so that at low temperatures not all of them become 0.
        probs = (probs / probs.amax(-1, keepdim=True)) ** (1 / temperature)
    return probs / probs.sum(-1, keepdim=True)


def _likeliest(probs: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor | None]:
    """Probabilities in falling order, as many as `top_p` and `top_k` can keep, and their ids if `top_k` wants them.

    Sorting a large vocabulary takes longer than all else in a draw, and is seldom needed.
    """
    vocab = probs.shape[-1]
    if top_k == 0 and probs.dim() == 1 and probs.device.type == "cpu":
        # All below this together have half of what `top_p` leaves over.
        few = probs[probs > (1 - top_p) / (2 * vocab)].numpy()
        return torch.from_numpy(-np.sort(-few)), None
    if top_k <= ENOUGH < vocab:
        ordered, ids = probs.topk(ENOUGH, dim=-1)
        if top_p < 1 and bool((ordered.sum(-1) >= top_p).all()):
            return ordered, ids
    return probs.sort(-1, descending=True)


class Sampler:
    """Draws the tokens of one sequence, remembering which were seen.

    Args:
        sampling: the settings.
        text_of: text of a token, for the rule that blanks and digits are not counted.
    """

    def __init__(self, sampling: Sampling, text_of: Callable[[int], str]) -> None:
        self.sampling = sampling
        self._text_of = text_of
        self._occurrence: dict[int, float] = {}
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def draw(self, logits: Tensor, allowed: Tensor | None = None) -> int:
        """The next token.

        Args:
            logits: `(V,)`; left as they are.
            allowed: the only tokens that may be chosen, `(V,)` bool; None allows all.

        Raises:
            NoNumbers: some of `logits` are none.
        """
        check_numbers(logits)
        sampling = self.sampling
        if sampling.greedy and allowed is None:
            return int(logits.argmax())
        logits = logits.float().cpu().clone()
        if allowed is not None:
            logits.masked_fill_(~allowed, -torch.inf)
        for token, amount in sampling.logit_bias:
            logits[token] += amount
        if sampling.token_ban:
            logits[list(sampling.token_ban)] = -torch.inf
        if self._occurrence and sampling.penalised:
            seen = list(self._occurrence)
            logits[seen] -= torch.tensor(
                [sampling.alpha_presence + self._occurrence[token] * sampling.alpha_frequency for token in seen]
            )
        if sampling.temperature == 0:
            return int(logits.argmax())
        probs = probabilities(logits, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)
        reached = probs.double().cumsum(0)
        point = torch.rand(1, dtype=torch.float64, generator=self._generator) * reached[-1]
        # Where rounding took the point to the very end, the last token that is possible.
        last = torch.searchsorted(reached, reached[-1:])
        return int(torch.minimum(torch.searchsorted(reached, point, right=True), last))

    def saw(self, token: int) -> None:
        """Remember a chosen token for the penalties."""
        if not self.sampling.penalised:
            return
        for seen in self._occurrence:
            self._occurrence[seen] *= self.sampling.alpha_decay
        counted = 0.0 if self._text_of(token) in UNCOUNTED else 1.0
        self._occurrence[token] = self._occurrence.get(token, 0.0) + counted
