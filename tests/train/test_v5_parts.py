"""What the flags of the v5 line and of state tuning change in a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from train_pieces import CTX, STEPS, VOCAB

import rookery
import rookery.train
from rookery.config import parse
from rookery.data import open_dataset
from rookery.errors import UserError
from rookery.formats import read_weights, write_pth
from rookery.models import ModelShape, create, initialise
from rookery.train.optim import parameter_groups
from rookery.train.schedule import Schedule

VERSIONS = ("x052", "x060", "x070")
RANKS = {"x052": {}, "x060": {"mix": 32, "decay": 64}, "x070": dict.fromkeys("wavg", 32)}
SHORT = {"epoch_steps": 4, "my_exit_tokens": 8 * 2 * CTX}
PARTS = {"head_qk": 8, "tiny_att_dim": 8, "tiny_att_layer": 1, "pre_ffn": 1, "my_pos_emb": 5}


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def write_base(file: Path, version: str, vocab_size: int = VOCAB) -> dict[str, torch.Tensor]:
    """A random model, whose layers do something, unlike those of initial weights."""
    model = create(ModelShape(version, 2, 32, vocab_size, 16, 32, 128 if version == "x070" else 96, RANKS[version]))
    initialise(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    write_pth(file, model.state_dict())
    return read_weights(file)


def tuned_by_hand(base: Path, config) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Plain state tuning: Adam over zero initial states, the reference's schedule and clipping. Losses and states."""
    model = rookery.load(base, kernel="reference").requires_grad_(False)
    H, N = model.shape.n_head, model.shape.head_size
    states = []
    for block in model.blocks:
        block.att.time_state = torch.nn.Parameter(torch.zeros(H, N, N))
        states.append(block.att.time_state)
    schedule = Schedule(1.0, 0.01, 10, 2 * CTX, config.data.my_exit_tokens, 4, 2)
    optimizer = torch.optim.Adam(states, betas=(0.9, 0.99), eps=1e-8)
    dataset = open_dataset(config.data)
    found = []
    for step in range(8):
        tokens, targets = map(torch.from_numpy, dataset.batch([2 * step, 2 * step + 1])[:2])
        logits, _state = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        # The L2 term of the reference: 1e-4 / rows times the largest logit.
        largest, place = logits.max(-1)
        penalty = (logits.gather(-1, place[..., None])[..., 0] * largest.detach()).sum() * 1e-4 / largest.numel()
        optimizer.zero_grad()
        (loss + penalty).backward()
        torch.nn.utils.clip_grad_norm_(states, 1.0)
        optimizer.param_groups[0]["lr"] = schedule.at(step).lr
        optimizer.step()
        found.append(loss.item())
    return found, {f"blocks.{i}.att.time_state": state.detach() for i, state in enumerate(states)}


@pytest.mark.parametrize("version", VERSIONS)
def test_state_tuning_equals_its_plain_restatement(config, tmp_path, capsys, version):
    base = tmp_path / "base.pth"
    weights = write_base(base, version)
    settings = dict.fromkeys(("n_layer", "n_embd", "lr_init", "lr_final"))
    tuning = config(**SHORT, **settings, peft="state", load_model=str(base), adam_eps=1e-8, weight_decay=0.0, grad_cp=1)
    rookery.train.run(tuning)
    said = capsys.readouterr().out
    assert "lr_init is 1.0, the custom of state tuning" in said
    assert "lr_final is 0.01, the custom of state tuning" in said
    expected, states = tuned_by_hand(base, tuning)
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=2e-5)
    final = read_weights(tmp_path / "run" / "rwkv-final.pth")
    assert final.keys() == states.keys()
    for name, state in states.items():
        torch.testing.assert_close(final[name], state, rtol=1e-3, atol=2e-3)

    mounted = rookery.load(base, state=tmp_path / "run" / "rwkv-final.pth")
    assert {name: t for name, t in mounted.state_dict().items() if name in weights}.keys() == weights.keys()
    tokens = torch.randint(0, VOCAB, (1, CTX))
    assert (mounted(tokens)[0] - rookery.load(base)(tokens)[0]).abs().max() > 0.01


def test_state_tuning_goes_on(config, tmp_path):
    base = tmp_path / "base.pth"
    write_base(base, "x070")
    tuning = {**SHORT, "peft": "state", "load_model": str(base), "n_layer": None}
    rookery.train.run(config(**tuning, proj_dir=str(tmp_path / "whole")))
    rookery.train.run(config(**tuning, my_exit=0))
    assert len(losses(tmp_path / "run")) == 4
    rookery.train.run(config(**tuning))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")

    # Without checkpoints: from the newest states over the same model.
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    (tmp_path / "run" / "rwkv-1.pth").unlink()
    rookery.train.run(config(**tuning))
    again = losses(tmp_path / "run")
    assert len(again) == 8
    assert again[:5] == pytest.approx(losses(tmp_path / "whole")[:5], abs=1e-6)


def test_states_need_a_model_and_may_begin_with_given_ones(config, tmp_path):
    with pytest.raises(UserError, match="give --load_model"):
        rookery.train.run(config(**SHORT, peft="state"))
    folder = tmp_path / "run"
    write_base(folder / "rwkv-init.pth", "x070")
    states = {f"blocks.{i}.att.time_state": torch.full((2, 16, 16), 0.5) for i in range(2)}
    write_pth(folder / "rwkv-init-state.pth", states)
    rookery.train.run(config(**SHORT, peft="state", lr_init=0.0, lr_final=0.0))
    final = read_weights(folder / "rwkv-final.pth")
    assert all(torch.equal(final[name], state) for name, state in states.items())


@pytest.mark.parametrize("version", ["x052", "x060"])
def test_a_model_with_every_optional_part_trains_and_goes_on(config, tmp_path, version):
    changes = {**SHORT, "version": version, "dropout": 0.1, "save_every": 3, **PARTS}
    rookery.train.run(config(**changes, proj_dir=str(tmp_path / "whole")))
    names = read_weights(tmp_path / "whole" / "rwkv-final.pth").keys()
    assert {"head_q.weight", "blocks.1.tiny_q.weight", "blocks.0.ffnPre.key.weight", "blocks.0.pos_emb_x"} <= names
    assert "blocks.0.att.key.weight" not in names
    rookery.train.run(config(**changes, my_exit=0))
    rookery.train.run(config(**changes))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole"), "dropout goes on with the same numbers"

    # The parts are read from the file; another size of one is refused.
    more = {**SHORT, "load_model": str(tmp_path / "run" / "rwkv-final.pth"), "proj_dir": str(tmp_path / "more")}
    rookery.train.run(config(**more, n_layer=None))
    saved = parse([], tmp_path / "more" / "config.toml").config.model
    assert {leaf: getattr(saved, leaf) for leaf in PARTS} == PARTS
    with pytest.raises(UserError, match=r"head_qk: 16 .*the file has 8"):
        rookery.train.run(config(**more, head_qk=16))


def test_dropout_acts_in_training_only(config, tmp_path):
    plain = {**SHORT, "version": "x060", "val_file": config().data.data_file}
    results = [
        rookery.train.run(config(**plain, dropout=p, lr_init=0.0, lr_final=0.0, proj_dir=str(tmp_path / str(p))))
        for p in (0.0, 0.5)
    ]
    assert losses(tmp_path / "0.0") != losses(tmp_path / "0.5")
    assert results[0].val_loss == results[1].val_loss


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_qk": 8}, "head_qk is a part of x052 and x060"),
        ({"version": "x060", "tiny_att_dim": 8}, "a block from 0 to 1"),
        ({"version": "x060", "tiny_att_dim": 8, "tiny_att_layer": 2}, "a block from 0 to 1"),
        ({"version": "x060", "my_pos_emb": 4}, "room for 15 tokens, fewer than ctx_len 16"),
    ],
)
def test_parts_that_cannot_be_had(config, changes, message):
    with pytest.raises(UserError, match=message):
        rookery.train.run(config(**changes))


def test_load_partial_adds_what_the_file_lacks(config, tmp_path):
    base = tmp_path / "base.pth"
    weights = write_base(base, "x060")
    del weights["blocks.1.ffn.key.weight"]
    write_pth(base, weights)
    changes = {**SHORT, "load_model": str(base), "head_qk": 8, "lr_init": 0.0, "lr_final": 0.0}
    with pytest.raises(UserError, match=r"head_qk: 8 .*the file has 0"):
        rookery.train.run(config(**changes))
    rookery.train.run(config(**changes, load_partial=1))
    final = read_weights(tmp_path / "run" / "rwkv-final.pth")
    assert {"head_q.weight", "blocks.1.ffn.key.weight"} <= final.keys()
    assert all(torch.equal(final[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("version", VERSIONS)
def test_stage_1_makes_a_larger_model_of_a_loaded_one(config, tmp_path, version):
    base = tmp_path / "base.pth"
    weights = write_base(base, version)
    rookery.train.run(config(train_stage=1, load_model=str(base), n_layer=3, n_embd=64, vocab_size=40))
    grown = read_weights(tmp_path / "run" / "rwkv-init.pth")
    assert grown["emb.weight"].shape == (40, 64)
    assert grown["blocks.2.ffn.value.weight"].abs().max() == 0, "a layer of its own begins with initial weights"
    assert torch.equal(grown["head.weight"][:VOCAB, ::2], weights["head.weight"])
    assert torch.equal(grown["blocks.1.att.key.weight"][::2, ::2], weights["blocks.1.att.key.weight"])
    rookery.train.run(config(**SHORT, n_layer=None, n_embd=None, vocab_size=40))
    assert len(losses(tmp_path / "run")) == 8


def test_stage_1_ignores_what_was_trained_before(config, tmp_path):
    rookery.train.run(config(**SHORT))
    before = read_weights(tmp_path / "run" / "rwkv-init.pth")
    rookery.train.run(config(**SHORT, train_stage=1, n_layer=3))
    assert read_weights(tmp_path / "run" / "rwkv-init.pth").keys() > before.keys()


def test_the_divisor_of_the_recurrence_is_kept_with_the_run(config, tmp_path):
    rookery.train.run(config(**SHORT, head_size_divisor=4))
    rookery.train.run(config(**SHORT, proj_dir=str(tmp_path / "plain")))
    assert losses(tmp_path / "run")[1:] != losses(tmp_path / "plain")[1:]
    assert rookery.load(tmp_path / "run").blocks[0].att.ln_x.eps == 16e-5
    assert rookery.load(tmp_path / "plain" / "rwkv-final.pth").blocks[0].att.ln_x.eps == 64e-5


def test_stage_4_takes_random_windows(config, tmp_path):
    rookery.train.run(config(**SHORT, train_stage=4))
    rookery.train.run(config(**SHORT, proj_dir=str(tmp_path / "plain")))
    assert losses(tmp_path / "run") != losses(tmp_path / "plain")
    assert len(losses(tmp_path / "run")) == 8


def test_decay_over_mini_epochs_may_begin_late(config, tmp_path):
    changes = {"my_exit_tokens": 0, "epoch_steps": 4, "epoch_count": 3, "warmup_steps": 0}
    rookery.train.run(config(**changes, my_pile_edecay=1))
    rows = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [json.loads(row)["lr"] for row in rows]
    assert rates[:3] == [3e-3] * 3
    expected = [3e-3 * 0.1 ** ((step - 3) / 8) for step in range(3, 12)]
    assert rates[3:] == pytest.approx(expected)


def test_the_last_mini_epoch_may_be_named(config, tmp_path):
    result = rookery.train.run(config(my_exit=1))
    assert result.step == 30 < STEPS
    assert (tmp_path / "run" / "rwkv-1.pth").exists()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("decays", [True, False])
def test_initial_states_are_in_the_group_of_the_matrices(version, decays):
    states = [(f"blocks.{i}.att.time_state", torch.zeros(2, 16, 16)) for i in range(2)]
    groups = parameter_groups(states, version, weight_decay=decays)
    (group,) = (group for group in groups if group.names)
    assert (group.lr_scale, group.decays, group.names) == (1.0, decays, [name for name, _state in states])
