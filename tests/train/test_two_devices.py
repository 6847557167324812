"""Two processes of a whole run: infinite context under ddp, and the validation loss that both share."""

import json
from pathlib import Path

import pytest
from train_pieces import CTX, write_data

import rookery.train


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("grad", ["truncated", "full"])
def test_infctx_and_validation_equal_one_process(config, command, tmp_path, grad):
    """113 windows are validated in batches of two: the last batch of one rank counts for nothing. Measured: 2e-7."""
    flags = {
        "train_type": "infctx",
        "infctx_grad": grad,
        "chunk_ctx": CTX // 2,
        "val_file": write_data(tmp_path / "validation", seed=1),
        "val_every": 5,
        "my_exit_tokens": 10 * 4 * CTX,
        "epoch_steps": 10,
    }
    process = command(**flags, devices=2, proj_dir=tmp_path / "pair")
    flags["val_file"] = str(flags["val_file"])
    rookery.train.run(config(**flags, micro_bsz=4, proj_dir=str(tmp_path / "one")))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    for key, count in (("loss", 10), ("grad_norm", 10), ("val_loss", 2)):
        found, expected = (
            [row[key] for row in rows(tmp_path / name) if key in row and row[key] is not None]
            for name in ("pair", "one")
        )
        assert len(expected) == count
        assert found == pytest.approx(expected, rel=1e-5)
