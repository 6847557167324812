"""Building, initialising and running models of every generation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rookery.config import rules
from rookery.errors import UserError
from rookery.formats import assign, load, shape_of, write_pth
from rookery.models import Model, ModelShape, Parts, create, initialise

GOLDEN = Path(__file__).parent.parent / "golden"
VERSIONS = ("x052", "x060", "x070")

versions = pytest.mark.parametrize("version", VERSIONS)


def shape_for(
    version: str, *, n_layer: int = 3, n_embd: int = 64, vocab_size: int = 96, **changes: object
) -> ModelShape:
    dimensions: dict[str, object] = {
        "head_size": 64,
        "dim_att": n_embd,
        "dim_ffn": rules.dim_ffn(version, n_embd),
        "ranks": rules.ranks(version, n_layer, n_embd),
    }
    return ModelShape(version, n_layer, n_embd, vocab_size, **(dimensions | changes))  # type: ignore[arg-type]


def fresh(shape: ModelShape, *, seed: int = 1, dropout: float = 0.0) -> Model:
    model = create(shape, dropout=dropout)
    initialise(model, seed)
    return model


def trained(shape: ModelShape, **settings: float) -> Model:
    """A model none of whose parameters is zero."""
    model = fresh(shape, **settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def some_tokens(shape: ModelShape, length: int = 20) -> Tensor:
    return torch.randint(0, shape.vocab_size, (2, length), generator=torch.Generator().manual_seed(3))


# Initial values


@versions
def test_initial_values_without_randomness(version: str) -> None:
    values = dict(fresh(shape_for(version)).named_parameters())
    with safe_open(GOLDEN / "init_deterministic.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(f"v5dir.{version}.")]  # noqa: SIM118 - not a dict
        for name in names:
            got = values[name.removeprefix(f"v5dir.{version}.")].detach().flatten()
            torch.testing.assert_close(
                got, file.get_tensor(name), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n} {m}"
            )
    assert len(names) == {"x052": 24, "x060": 30, "x070": 39}[version]


@versions
def test_random_initial_values_have_the_statistics_of_the_reference(version: str) -> None:
    values = dict(fresh(shape_for(version)).named_parameters())
    source = "train_temp" if version == "x070" else "v5dir"
    rows = json.loads((GOLDEN / "init_stats.json").read_text(encoding="utf-8"))["rows"]
    rows = {name.split("|")[1]: row for name, row in rows.items() if name.startswith(f"{source}.{version}|")}
    assert {"emb.weight", "head.weight", "blocks.0.att.output.weight", "blocks.2.att.ln_x.weight"} <= rows.keys()
    for name, row in rows.items():
        got = values[name].detach()
        if "constant" in row:
            assert got.unique().tolist() == pytest.approx([row["constant"]], rel=5e-3), name
            continue
        assert list(got.shape) == row["shape"], name
        assert float(got.std()) == pytest.approx(row["std"], rel=0.1), name
        if row.get("kind") == "orthogonal":
            singular = torch.linalg.svdvals(got.flatten(0, -2))
            assert float(singular.min()) == pytest.approx(row["sv_min"], rel=0.01), name
            assert float(singular.max()) == pytest.approx(row["sv_max"], rel=0.01), name
        else:
            assert float(got.abs().max()) == pytest.approx(row["absmax"], rel=0.1), name


@versions
def test_the_seed_decides_the_initial_values(version: str) -> None:
    one, same, other = (fresh(shape_for(version, n_layer=1), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["emb.weight"], other["emb.weight"])


# Dimensions


@versions
def test_dimensions_are_read_off_a_checkpoint(version: str) -> None:
    path = GOLDEN / f"{version}_ckpt.safetensors"
    with safe_open(path, framework="pt") as file:
        known = json.loads(file.metadata()["config"])
    shape = load(path, device="cpu").shape
    for name in ("version", "n_layer", "n_embd", "dim_att", "dim_ffn", "vocab_size", "head_size", "n_head"):
        assert getattr(shape, name) == known[name], name
    if version == "x070":
        assert shape.ranks == known["ranks"]
    if version == "x060":
        assert shape.ranks == {"mix": 32, "decay": 64}
    assert shape.parts == Parts()


@versions
def test_names_and_shapes_are_those_of_the_checkpoint(version: str) -> None:
    tensors = load_file(GOLDEN / f"{version}_ckpt.safetensors")
    model = create(shape_of(tensors, "it"))
    assert {name: p.shape for name, p in model.state_dict().items()} == {name: t.shape for name, t in tensors.items()}


@versions
def test_number_of_parameters(version: str) -> None:
    """The published formulas, with V ids, width C, L layers, feed-forward width F and low ranks."""
    shape = shape_for(version, n_layer=2, n_embd=128, vocab_size=200)
    V, C, L, F, ranks = 200, 128, 2, shape.dim_ffn, shape.ranks
    per_layer = {
        "x052": lambda: 14 * C + 6 * C**2 + 2 * C * F,
        "x060": lambda: 16 * C + 6 * C**2 + 2 * C * F + 10 * C * ranks["mix"] + 2 * C * ranks["decay"],
        "x070": lambda: 19 * C + 12 * C**2 + 2 * C * sum(ranks.values()),
    }[version]()
    assert sum(p.numel() for p in create(shape).parameters()) == 2 * V * C + 4 * C + L * per_layer


@pytest.mark.parametrize("version", ["x052", "x060"])
def test_time_mixing_may_be_wider_than_the_model(version: str) -> None:
    model = trained(shape_for(version, n_layer=1, dim_att=128))
    shape = shape_of(model.state_dict(), "it")
    assert (shape.dim_att, shape.n_head, shape.n_embd) == (128, 2, 64)
    logits, state = model(some_tokens(shape))
    assert logits.shape == (2, 20, 96)
    assert state.wkv.shape == (1, 2, 2, 64, 64)


@pytest.mark.parametrize(
    ("version", "rename", "found"),
    [
        ("x060", {"att.time_maa_w1": "att.time_maa_rkvw_w1"}, "x060b"),
        ("x060", {"att.gate.weight": "att.gate_w1"}, "x060a"),
        ("x070", {"ffn.key.weight": "ffn.s_emb.weight"}, "RWKV-7a/7b"),
        ("x052", {"att.gate.weight": "att.gone"}, "RWKV-5.0"),
    ],
)
def test_look_alikes_are_refused(version: str, rename: dict[str, str], found: str) -> None:
    shapes = {name: tuple(t.shape) for name, t in load_file(GOLDEN / f"{version}_ckpt.safetensors").items()}
    for old, new in rename.items():
        shapes |= {name.replace(old, new): size for name, size in shapes.items() if old in name}
        if "gate" in old:
            shapes = {name: size for name, size in shapes.items() if old not in name}
    with pytest.raises(UserError, match=f"it.pth is a model of version {found}.*x052, x060, x070"):
        ModelShape.of_checkpoint(shapes, "it.pth")


def test_a_decay_per_head_is_refused() -> None:
    shapes = {name: tuple(t.shape) for name, t in load_file(GOLDEN / "x052_ckpt.safetensors").items()}
    shapes |= {name: (2, 1) for name in shapes if name.endswith(("time_decay", "time_faaaa"))}
    with pytest.raises(UserError, match=r"version RWKV-5\.1"):
        ModelShape.of_checkpoint(shapes, "it.pth")


@pytest.mark.parametrize("gone", ["emb.weight", "blocks.0.ffn.key.weight", "blocks.2.att.w1", "blocks.2.att.v1"])
def test_a_missing_tensor_is_named(gone: str) -> None:
    shapes = {name: tuple(t.shape) for name, t in load_file(GOLDEN / "x070_ckpt.safetensors").items() if name != gone}
    with pytest.raises(UserError, match=f"it.pth holds no whole RWKV model: {gone} is missing"):
        ModelShape.of_checkpoint(shapes, "it.pth")


def test_x070_without_the_unread_values_of_block_0() -> None:
    tensors = load_file(GOLDEN / "x070_ckpt.safetensors")
    tokens = some_tokens(shape_of(tensors, "it"))
    with torch.no_grad():
        whole = load(GOLDEN / "x070_ckpt.safetensors", device="cpu")(tokens)[0]
        for name in ("v0", "v1", "v2"):
            del tensors[f"blocks.0.att.{name}"]
        model = create(shape_of(tensors, "it"))
        assign(model, tensors, "it")
        assert torch.equal(model(tokens)[0], whole)


# Running


@versions
def test_one_layer_and_one_token(version: str) -> None:
    model = trained(shape_for(version, n_layer=1)).double()
    assert all(p.isfinite().all() for p in fresh(shape_for(version, n_layer=1)).parameters())
    tokens = some_tokens(model.shape, 5)
    whole, _ = model(tokens)
    state = None
    for t in range(5):
        logits, state = model(tokens[:, t : t + 1], state)
        torch.testing.assert_close(logits[:, 0], whole[:, t])
    loss, _ = model.loss(tokens, tokens)
    loss.backward()
    unread = {f"blocks.0.att.{x}" for x in ("v0", "v1", "v2")} if version == "x070" else set()
    assert {name for name, p in model.named_parameters() if p.grad is None} == unread


@versions
def test_gradient_checkpointing_changes_nothing(version: str) -> None:
    model = trained(shape_for(version)).double().train()
    tokens = some_tokens(model.shape)
    gradients = []
    for model.grad_cp in (False, True):
        model.zero_grad()
        loss, _ = model.loss(tokens, tokens)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


@versions
def test_dropout_falls_on_the_embedding_and_on_every_sum(version: str) -> None:
    model = trained(shape_for(version, n_layer=2), dropout=0.3).double()
    tokens = some_tokens(model.shape)
    with torch.no_grad():
        model.train()
        torch.manual_seed(7)
        got, _ = model.hidden(tokens)

        torch.manual_seed(7)
        zeros = model.initial_state(2, got)
        x = model.blocks[0].ln0(F.dropout(model.emb(tokens), 0.3))
        carried: list[Tensor] = []
        for layer, block in enumerate(model.blocks):
            y, _, *carried = block.att(block.ln1(x), zeros.att_shift[layer], zeros.wkv[layer], "reference", *carried)
            x = F.dropout(x + y, 0.3)
            x = F.dropout(x + block.ffn(block.ln2(x), zeros.ffn_shift[layer]), 0.3)
        torch.testing.assert_close(got, model.ln_out(x))

        model.eval()
        plain = trained(shape_for(version, n_layer=2)).double()
        torch.testing.assert_close(model.hidden(tokens)[0], plain.hidden(tokens)[0])


# Optional parts of the v5 line


def test_head_qk_and_tiny_attention_match_the_reference() -> None:
    golden = load_file(GOLDEN / "optional_headqk_tinyatt.safetensors")
    weights = {name.removeprefix("w."): tensor for name, tensor in golden.items() if name.startswith("w.")}
    # The reference's files also hold its masks.
    weights |= {"copy_mask": torch.ones(24, 24).tril(), "blocks.1.tiny_mask": torch.ones(24, 24).tril()}
    shape = shape_of(weights, "it")
    assert shape.parts == Parts(head_qk=8, tiny_att_dim=16, tiny_att_layer=1)
    model = create(shape)
    assign(model, weights, "it")
    model = model.double()
    with torch.no_grad():
        torch.testing.assert_close(model(golden["idx"])[0], golden["logits"].double(), rtol=0, atol=1e-6)
        model.head_q.weight.zero_()
        model.blocks[1].tiny_v.weight.zero_()
        plain = golden["logits_without_head_qk_and_tiny_att"].double()
        torch.testing.assert_close(model(golden["idx"])[0], plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("version", ["x052", "x060"])
def test_the_loss_counts_head_qk(version: str) -> None:
    model = trained(shape_for(version, parts=Parts(head_qk=8))).double()
    tokens = some_tokens(model.shape)
    targets = tokens.roll(-1, dims=1).index_fill(1, torch.tensor([4]), -100)
    loss, _ = model.loss(tokens, targets)
    want = F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-12)
    loss.backward()
    assert model.head_q.weight.grad is not None
    assert model.head_q.weight.grad.any()


@pytest.mark.parametrize("version", ["x052", "x060"])
def test_pre_ffn_and_position_embedding(version: str, tmp_path: Path) -> None:
    parts = Parts(my_pos_emb=5, pre_ffn=True)
    model = trained(shape_for(version, parts=parts)).double()
    write_pth(tmp_path / "model.pth", model.state_dict())
    model = load(tmp_path / "model.pth", device="cpu", dtype=torch.float64)
    assert model.shape.parts == parts
    names = set(model.state_dict())
    assert {"blocks.0.pos_emb_x", "blocks.0.pos_emb_y", "blocks.0.ffnPre.time_mix_k"} <= names
    assert not any(name.startswith("blocks.0.att.") for name in names)

    tokens = some_tokens(model.shape, 24)
    block = model.blocks[0]
    zeros = model.initial_state(2, block.ln1.weight)
    with torch.no_grad():
        places = torch.stack([block.pos_emb_x[0, i % 5] + block.pos_emb_y[i // 5, 0] for i in range(24)])
        x = block.ln0(model.emb(tokens)) + places
        x = x + block.ffnPre(block.ln1(x), zeros.att_shift[0])
        x = x + block.ffn(block.ln2(x), zeros.ffn_shift[0])
        for layer in (1, 2):
            block = model.blocks[layer]
            x = x + block.att(block.ln1(x), zeros.att_shift[layer], zeros.wkv[layer], "reference")[0]
            x = x + block.ffn(block.ln2(x), zeros.ffn_shift[layer])
        torch.testing.assert_close(model(tokens)[0], model.head(model.ln_out(x)))
        with pytest.raises(UserError, match="embedding for 24 positions; 25 do not fit"):
            model(some_tokens(model.shape, 25))


def test_initial_values_of_optional_parts() -> None:
    parts = Parts(head_qk=8, tiny_att_dim=16, tiny_att_layer=1, my_pos_emb=5, pre_ffn=True)
    values = dict(fresh(shape_for("x052", parts=parts)).named_parameters())
    for name in ("head_q.weight", "blocks.0.ffnPre.value.weight", "blocks.0.ffnPre.receptance.weight"):
        assert not values[name].any(), name
    for name, gain in (("head_k.weight", 0.1), ("blocks.1.tiny_q.weight", 1.0), ("blocks.0.ffnPre.key.weight", 1.0)):
        torch.testing.assert_close(torch.linalg.svdvals(values[name]).mean(), torch.tensor(gain), rtol=1e-4, atol=0)
    assert not values["blocks.0.pos_emb_x"].any()


@pytest.mark.parametrize("parts", [Parts(head_qk=8), Parts(tiny_att_dim=16), Parts(my_pos_emb=5)])
def test_what_looks_at_a_whole_text_cannot_go_on_from_a_state(parts: Parts) -> None:
    model = trained(shape_for("x052", parts=parts))
    tokens = some_tokens(model.shape)
    _, state = model(tokens)
    with pytest.raises(UserError, match="looks at a whole text at once and cannot go on from a state"):
        model(tokens, state)


def test_pre_ffn_goes_on_from_a_state() -> None:
    model = trained(shape_for("x060", parts=Parts(pre_ffn=True))).double()
    tokens = some_tokens(model.shape)
    whole, _ = model(tokens)
    _, state = model(tokens[:, :7])
    torch.testing.assert_close(model(tokens[:, 7:], state)[0], whole[:, 7:])
