"""The dimensions of a model, given by hand or read from a checkpoint's tensor shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rookery.config import rules
from rookery.config.resolve import RANK_LEAVES
from rookery.config.tree import ModelSection
from rookery.errors import UserError
from rookery.i18n import _

VERSIONS = ("x052", "x060", "x070")


@dataclass(frozen=True)
class Parts:
    """Optional parts of x052 and x060 (see `rookery.models.legacy`); 0 or False: the model does not have it."""

    head_qk: int = 0
    tiny_att_dim: int = 0
    tiny_att_layer: int = 0
    my_pos_emb: int = 0
    pre_ffn: bool = False

    @classmethod
    def of_config(cls, model: ModelSection) -> Parts:
        return cls(model.head_qk, model.tiny_att_dim, model.tiny_att_layer or 0, model.my_pos_emb, model.pre_ffn > 0)


@dataclass(frozen=True)
class ModelShape:
    """Everything that fixes the names and shapes of a model's parameters."""

    version: str
    n_layer: int
    n_embd: int
    vocab_size: int
    head_size: int
    dim_att: int
    dim_ffn: int
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Widths of the low-rank layers. x070: w, a, v, g; x060: mix, decay; x052: none."""
    parts: Parts = Parts()
    head_size_divisor: int = 8
    """By which the reference divides the recurrence's output before normalising it. No file records it."""

    @property
    def group_norm_eps(self) -> float:
        """Epsilon of the normalisation after the recurrence: that of the undivided output, 64e-5 in every release."""
        return 1e-5 * self.head_size_divisor**2

    @property
    def n_head(self) -> int:
        return self.dim_att // self.head_size

    @classmethod
    def of_config(cls, model: ModelSection) -> ModelShape:
        """The dimensions that a resolved configuration asks for; every one of them is concrete."""
        version, n_layer, n_embd = str(model.version), int(model.n_layer or 0), int(model.n_embd or 0)
        ranks = rules.ranks(version, n_layer, n_embd, model.rank_rule)
        ranks |= {rank: getattr(model, RANK_LEAVES[rank]) for rank in ranks if rank in RANK_LEAVES}
        return cls(
            version, n_layer, n_embd, int(model.vocab_size or 0), model.head_size, int(model.dim_att or 0),
            int(model.dim_ffn or 0), ranks, Parts.of_config(model), model.head_size_divisor,
        )  # fmt: skip

    @classmethod
    def of_checkpoint(cls, shapes: Mapping[str, Sequence[int]], name: str) -> ModelShape:
        """Read the dimensions off a checkpoint.

        Args:
            shapes: tensor name -> shape.
            name: what to call the file in an error.

        Raises:
            UserError: not an RWKV model, or a version that is not supported.
        """
        try:
            shape = cls._read(shapes, name)
            layers = {int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")}
            # Tensors without elements cost a file nothing and could ask for any amount of memory.
            consistent = layers == set(range(shape.n_layer)) and all(min(s, default=1) > 0 for s in shapes.values())
        except (ValueError, IndexError, ZeroDivisionError):
            consistent = False
        if not consistent:
            raise UserError(_("{name} holds tensors of names or shapes that no RWKV model has", name=name))
        return shape

    @classmethod
    def _read(cls, shapes: Mapping[str, Sequence[int]], name: str) -> ModelShape:
        def size(key: str) -> Sequence[int]:
            if key not in shapes:
                raise UserError(_("{name} holds no whole RWKV model: {key} is missing", name=name, key=key))
            return shapes[key]

        vocab_size, n_embd = size("emb.weight")
        dim_ffn, _C = size("blocks.0.ffn.key.weight")
        version = _version(shapes, name)
        n_layer = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks."))
        # The last block: files of some trainers lack the value residual of block 0, and with pre_ffn it has no att.
        att = f"blocks.{n_layer - 1}.att"
        n_head, head_size = size(f"{att}.{'r_k' if version == 'x070' else 'time_faaaa'}")
        ranks = {}
        if version == "x060":
            ranks = {"mix": size(f"{att}.time_maa_w1")[1] // 5, "decay": size(f"{att}.time_decay_w1")[1]}
        if version == "x070":
            ranks = {x: size(f"{att}.{x}1")[1] for x in "wag"}
            # In a model of one block nothing reads the value residual, and the file may lack it.
            ranks["v"] = size(f"{att}.v1")[1] if n_layer > 1 or f"{att}.v1" in shapes else 32
        return cls(version, n_layer, n_embd, vocab_size, head_size, n_head * head_size, dim_ffn, ranks, _parts(shapes))


def _parts(shapes: Mapping[str, Sequence[int]]) -> Parts:
    tiny = [key for key in shapes if key.endswith(".tiny_q.weight")]
    return Parts(
        head_qk=shapes["head_q.weight"][0] if "head_q.weight" in shapes else 0,
        tiny_att_dim=shapes[tiny[0]][0] if tiny else 0,
        tiny_att_layer=int(tiny[0].split(".")[1]) if tiny else 0,
        my_pos_emb=shapes["blocks.0.pos_emb_x"][1] if "blocks.0.pos_emb_x" in shapes else 0,
        pre_ffn="blocks.0.ffnPre.key.weight" in shapes,
    )


def _version(shapes: Mapping[str, Sequence[int]], name: str) -> str:
    def any_key(part: str) -> bool:
        return any(part in key for key in shapes)

    if any_key(".ffn.s_emb") or any_key(".qkv.") or any_key(".ffn.s0"):
        found = "RWKV-7a/7b (DeepEmbed)"
    elif "blocks.0.att.r_k" in shapes:
        return "x070"
    elif any_key("time_maa_rkvw_w1"):
        found = "x060b"
    elif any_key("time_maa") and any_key("att.gate_w1"):
        found = "x060a"
    elif any_key("time_maa"):
        return "x060"
    elif any_key("att.gate.weight"):
        decay = next((shape for key, shape in shapes.items() if key.endswith(".att.time_decay")), ())
        if len(decay) == 2 and decay[1] > 1:
            return "x052"
        found = "RWKV-5.1"
    else:
        found = "RWKV-5.0" if any_key("att.ln_x") else "RWKV-4 or older"
    raise UserError(
        _(
            "{name} is a model of version {found}; Rookery knows {known}",
            name=name,
            found=found,
            known=", ".join(VERSIONS),
        )
    )
