"""Optional parts of the v5 line of trainers, for x052 and x060: head_qk, tiny attention, my_pos_emb, pre_ffn.

Released models have none of them. Names and formulas are those of RWKV-LM's RWKV-v5 trainer; `pre_ffn`, which its code
still names but no longer has, is that of its copy in RWKV-Runner. The causal masks that the reference keeps as buffers
in its files are neither read nor written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rookery.errors import UserError
from rookery.i18n import _
from rookery.models import rwkv5
from rookery.models.common import Block, LanguageModel, LayerState, TimeMixing, orthogonal_
from rookery.models.rwkv5 import RWKV5
from rookery.models.rwkv6 import RWKV6
from rookery.models.shape import ModelShape
from rookery.models.state import State
from rookery.ops.context import Passage
from rookery.ops.head_loss import logits_loss
from rookery.ops.linear import Linear
from rookery.ops.packed import Packing, last


class LegacyBlock(Block):
    """A block with those optional parts that belong to its layer. It carries the raw embedding to the next."""

    def __init__(self, plain: Block, shape: ModelShape, layer: int) -> None:
        parts, C = shape.parts, shape.n_embd
        self.pre_ffn = parts.pre_ffn and layer == 0
        att = NoTimeMixing(shape, layer) if self.pre_ffn else plain.att
        super().__init__(att, plain.ffn, shape, layer, plain.dropout)
        if self.pre_ffn:
            self.ffnPre = rwkv5.ChannelMix(shape, layer)
        if parts.my_pos_emb and layer == 0:
            self.pos_emb_x = nn.Parameter(torch.empty(1, parts.my_pos_emb, C))
            self.pos_emb_y = nn.Parameter(torch.empty(parts.my_pos_emb, 1, C))
        self.tiny_att = parts.tiny_att_dim > 0 and layer == parts.tiny_att_layer
        if self.tiny_att:
            self.tiny_ln = nn.LayerNorm(C)
            self.tiny_q = Linear(C, parts.tiny_att_dim)
            self.tiny_k = Linear(C, parts.tiny_att_dim)
            self.tiny_v = Linear(C, C)

    def forward(
        self, x: Tensor, before: LayerState, kernel: str, *carried: Tensor, packing: Packing | None = None
    ) -> tuple[Tensor, LayerState, *tuple[Tensor, ...]]:
        (embedding,) = carried
        if self.pre_ffn:
            x, after = self._with_two_channel_mixings(x, before, kernel, packing)
        else:
            x, after, *_nothing = super().forward(x, before, kernel, packing=packing)
        if self.tiny_att:
            z = self.tiny_ln(x)
            q, k = self.tiny_q(z), self.tiny_k(z)
            x = x + (q @ k.mT * q.shape[-1] ** -0.5).tril() @ self.tiny_v(embedding)
        return x, after, embedding

    def _with_two_channel_mixings(
        self, x: Tensor, before: LayerState, kernel: str, packing: Packing | None
    ) -> tuple[Tensor, LayerState]:
        """Like a plain block, `ffnPre` in the place of time mixing."""
        pre_shift, wkv, ffn_shift = before
        pre_in = self.ln1(x)
        x = F.dropout(x + self.ffnPre(pre_in, pre_shift, kernel, packing=packing), self.dropout, self.training)
        ffn_in = self.ln2(x)
        x = F.dropout(x + self.ffn(ffn_in, ffn_shift, kernel, packing=packing), self.dropout, self.training)
        return x, (last(pre_in, packing), wkv, last(ffn_in, packing))

    def positions(self, T: int) -> Tensor:
        """Embedding of the first T positions, (T, C)."""
        # The reference leaves the last place of the square unused.
        grid = (self.pos_emb_x + self.pos_emb_y).flatten(0, 1)[:-1]
        if len(grid) < T:
            raise UserError(
                _("the model has an embedding for {places} positions; {tokens} do not fit", places=len(grid), tokens=T)
            )
        return grid[:T]

    def initialise(self, generator: torch.Generator) -> None:
        super().initialise(generator)
        if self.pre_ffn:
            self.ffnPre.initialise(generator)
        if hasattr(self, "pos_emb_x"):
            nn.init.zeros_(self.pos_emb_x)
            nn.init.zeros_(self.pos_emb_y)
        if self.tiny_att:
            for matrix in (self.tiny_q, self.tiny_k, self.tiny_v):
                orthogonal_(matrix.weight, 1.0, generator)


class NoTimeMixing(TimeMixing):
    """Stands where a block with `pre_ffn` has no time mixing. It has no parameters."""

    def initialise(self, generator: torch.Generator) -> None:
        pass


class Legacy(LanguageModel):
    """What the optional parts change in a model; mixed into the class of a generation."""

    blocks: Sequence[LegacyBlock]

    def add_parts(self) -> None:
        C, parts = self.shape.n_embd, self.shape.parts
        self.blocks = nn.ModuleList(  # type: ignore[assignment]  # no element type
            LegacyBlock(block, self.shape, layer) for layer, block in enumerate(self.blocks)
        )
        if parts.head_qk:
            self.head_q = Linear(C, parts.head_qk)
            self.head_k = Linear(C, parts.head_qk)

    def forward(
        self, tokens: Tensor, state: State | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.hidden(tokens, state, lengths=lengths)
        logits = self.head(x)
        if self.shape.parts.head_qk:
            q, k = self.head_q(x), self.head_k(x)
            scores = (q @ k.mT / q.shape[-1]).tril()
            B, T, _C = x.shape
            # Adds to the logit of every token that has occurred its score at that place.
            logits = logits.scatter_add(2, tokens[:, None, :].expand(B, T, T), scores)
        return logits, state

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: State | Passage | None = None,
        *,
        lengths: Tensor | None = None,
        trained: int | None = None,
        l2wrap: bool = True,
        chunk: int = 0,
    ) -> tuple[Tensor, State]:
        assert not isinstance(state, Passage), "context_parallel is refused with these parts"
        if not self.shape.parts.head_qk:
            return super().loss(tokens, targets, state, lengths=lengths, trained=trained, l2wrap=l2wrap, chunk=chunk)
        logits, after = self(tokens, state, lengths=lengths)
        return logits_loss(logits, targets, l2wrap=l2wrap), after

    def hidden(
        self, tokens: Tensor, state: State | Passage | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        parts = self.shape.parts
        if parts.head_qk or parts.tiny_att_dim or parts.my_pos_emb:
            if state is not None:
                raise UserError(
                    _(
                        "this model has head_qk, tiny attention or a position embedding: it looks at a whole text at "
                        "once and cannot go on from a state"
                    )
                )
            if lengths is not None:
                raise UserError(
                    _(
                        "this model has head_qk, tiny attention or a position embedding: it looks at a whole sample at "
                        "once, in which several documents cannot be packed. Use --dataload get, pad or only."
                    )
                )
        return super().hidden(tokens, state, lengths=lengths)

    def embed(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        embedding = self.emb(tokens)
        x = self.blocks[0].ln0(F.dropout(embedding, self.dropout, self.training))
        if self.shape.parts.my_pos_emb:
            x = x + self.blocks[0].positions(tokens.shape[1])
        return x, [embedding]

    def parts(self) -> Iterator[tuple[nn.Module, Callable[[torch.Generator], object]]]:
        yield from super().parts()
        if self.shape.parts.head_qk:
            yield self.head_q, lambda generator: nn.init.zeros_(self.head_q.weight)
            yield self.head_k, lambda generator: orthogonal_(self.head_k.weight, 0.1, generator)


class LegacyRWKV5(Legacy, RWKV5):
    """RWKV-5.2 with optional parts."""

    def __init__(self, shape: ModelShape, *, kernel: str = "auto", dropout: float = 0.0) -> None:
        super().__init__(shape, kernel=kernel, dropout=dropout)
        self.add_parts()


class LegacyRWKV6(Legacy, RWKV6):
    """RWKV-6 with optional parts."""

    def __init__(self, shape: ModelShape, *, kernel: str = "auto", dropout: float = 0.0) -> None:
        super().__init__(shape, kernel=kernel, dropout=dropout)
        self.add_parts()
