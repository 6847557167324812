"""The argument lists of published training scripts, their sizes shrunk and nothing else changed, in real processes.

The lists are those of RWKV-LM (RWKV-v5 and RWKV-v7/train_temp), RWKV-PEFT and RWKV Runner. Words in capitals are the
values that each test shrinks: dimensions, number of devices, steps, and where the data lie.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from rookery.data import BinIdxWriter, magic_prime
from rookery.formats import read_adapter, read_weights, write_pth
from rookery.models import ModelShape, create, initialise
from rookery.tokenizer import World

CTX = 16
TOKENS = 1700

V5_PREPARE = """
--wandb "" --proj_dir PROJ --data_file "DATA" --data_type "binidx" --vocab_size 65536
--ctx_len CTX --my_pile_stage 1 --epoch_count 1 --epoch_begin 0 --epoch_save 1 --weight_decay 0 --head_size_a 64
--num_nodes 1 --micro_bsz 1 --n_layer LAYERS --n_embd WIDTH --pre_ffn 0 --head_qk 0 --my_exit_tokens TOKENS
--magic_prime PRIME --lr_init 1e-5 --lr_final 1e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8
--my_pile_edecay 0 --accelerator cpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 0
--enable_progress_bar False --ds_bucket_mb 200
"""
"""RWKV-v5/demo-training-prepare.sh, which leaves the version to the trainer."""

V5_RUN = """
--load_model "0" --wandb "Test" --proj_dir PROJ --my_testing VERSION
--ctx_len CTX --my_pile_stage 3 --epoch_count 999999 --epoch_begin 0 --data_file "DATA" --my_exit_tokens TOKENS
--magic_prime PRIME --num_nodes 1 --micro_bsz 16 --n_layer LAYERS --n_embd WIDTH --pre_ffn 0 --head_qk 0
--lr_init 6e-4 --lr_final 6e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-18 --my_pile_edecay 0
--data_type "binidx" --vocab_size 65536 --weight_decay 0.001 --epoch_save 10 --head_size_a 64
--accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1 --ds_bucket_mb 2
"""
"""RWKV-v5/demo-training-run.sh."""

V7_PREPARE = """
--wandb "" --proj_dir PROJ --data_file "DATA" --data_type "binidx" --vocab_size 65536 --my_testing x070
--ctx_len CTX --train_stage 1 --epoch_count 1 --epoch_begin 0 --epoch_save 1 --weight_decay 0 --head_size 64
--num_nodes 1 --micro_bsz 1 --n_layer LAYERS --n_embd WIDTH --my_exit_tokens TOKENS --magic_prime PRIME
--lr_init 1e-5 --lr_final 1e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8
--accelerator cpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1
"""
"""RWKV-v7/train_temp/demo-training-prepare.sh."""

V7_RUN = """
--load_model "0" --wandb "Test" --proj_dir PROJ --my_testing x070
--ctx_len CTX --train_stage 3 --epoch_count 999999 --epoch_begin 0 --data_file "DATA" --my_exit_tokens TOKENS
--magic_prime PRIME --num_nodes 1 --micro_bsz 16 --n_layer LAYERS --n_embd WIDTH
--lr_init 6e-4 --lr_final 6e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-18 --data_type "binidx"
--vocab_size 65536 --weight_decay 0.001 --epoch_save 10 --head_size 64 --accelerator gpu --devices 1
--precision bf16 --strategy deepspeed_stage_2 --grad_cp 1 --enable_progress_bar True
"""
"""RWKV-v7/train_temp/demo-training-run.sh."""

PILE_PREPARE = """
--wandb "" --proj_dir PROJ --data_file "DATA" --data_type "binidx" --vocab_size 50304 --my_testing x070
--ctx_len CTX --my_pile_stage 1 --epoch_count 1 --epoch_begin 0 --epoch_save 1 --weight_decay 0 --head_size_a 64
--num_nodes 1 --micro_bsz 1 --n_layer LAYERS --n_embd WIDTH --pre_ffn 0 --head_qk 0 --my_exit_tokens TOKENS
--magic_prime PRIME --lr_init 1e-5 --lr_final 1e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8
--my_pile_edecay 0 --accelerator cpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1
"""
"""RWKV-v5/demo-training-prepare-v7-pile.sh."""

PILE_RUN = """
--load_model "0" --wandb "RWKV-7-Pile" --proj_dir PROJ --my_testing x070
--ctx_len CTX --my_pile_stage 3 --epoch_count 999999 --epoch_begin 0 --data_file "DATA" --my_exit_tokens TOKENS
--magic_prime PRIME --num_nodes 1 --micro_bsz 30 --n_layer LAYERS --n_embd WIDTH --pre_ffn 0 --head_qk 0
--lr_init 8e-4 --lr_final 3e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-18 --my_pile_edecay 0
--data_type "binidx" --vocab_size 50304 --weight_decay 0.1 --epoch_save 50 --head_size_a 64
--accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1 --enable_progress_bar True
--ds_bucket_mb 200
"""
"""RWKV-v5/demo-training-run-v7-pile.sh; its 8 devices are 1 here."""

PEFT = """
--load_model MODEL --proj_dir PROJ --data_file DATA --data_type binidx --vocab_size 65536
--ctx_len CTX --epoch_steps 2 --epoch_count EPOCHS --epoch_begin 0 --epoch_save 1 --micro_bsz BATCH
--n_layer LAYERS --n_embd WIDTH --pre_ffn 0 --head_qk 0 RATES --beta1 0.9 --beta2 0.99 --adam_eps 1e-8
--accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_1 --grad_cp 1 --my_testing "VERSION"
"""
"""What the scripts of RWKV-PEFT have in common."""

STATE_TUNING = PEFT.replace("RATES", "--lr_init 1 --lr_final 1e-2 --warmup_steps 10") + (
    '--train_type "state" --dataload pad --fla'
)
"""scripts/demo-state-tuning.sh."""

FINETUNE = PEFT.replace("RATES", "--lr_init 6e-4 --lr_final 6e-5 --warmup_steps 10").replace(
    "--strategy deepspeed_stage_1", "--strategy single_device"
).replace("--load_model MODEL", "").replace("--accelerator gpu", "--accelerator xpu") + (
    '--train_type "finetune" --dataload pad --fla --wandb peft-test-platform'
)
"""scripts/demo-finetune.sh, which trains a new model when no other is given."""

_SLOW = PEFT.replace("RATES", "--lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0")

ADAPTERS = {
    # scripts/run_lora.sh, run_pissa.sh, run_disha.sh, run_bone.sh, run_lora_fp8.sh, and the newer script of miss
    "lora": """--dataload pad --loss_mask pad --peft lora
        --lora_config '{"lora_load":"","lora_r":32,"lora_alpha":32,"lora_dropout":0.0}' --wandb peft-loss""",
    "pissa": """--dataload pad --loss_mask pad --peft pissa
        --pissa_config '{"pissa_load":"","pissa_init":"","pissa_r":32,"svd_niter":4}' --wandb peft-loss""",
    "disha": """--dataload pad --loss_mask pad --peft disha --disha_config '{"mode":"bone","load":"","r":64}'""",
    "bone": """--dataload pad --loss_mask pad --peft bone --bone_config '{"bone_load":"","bone_r":64}'""",
    "fp8": """--dataload pad --peft lora --train_parts [] --quant "fp8"
        --lora_config '{"lora_load":"","lora_r":32,"lora_alpha":32,"lora_dropout":0.0}'""",
    "miss": """--dataload pad --peft miss --peft_config '{"r":64}' --merge 1 --op cuda""",
}

RUNNER = """
--n_layer LAYERS --n_embd WIDTH --vocab_size 65536 --precision bf16 --grad_cp 1 --ctx_len CTX --epoch_steps 2
--epoch_count EPOCHS --epoch_begin 0 --epoch_save 1 --lr_init 5e-5 --lr_final 5e-5 --micro_bsz BATCH --pre_ffn 0
--head_qk 0 --warmup_steps 0 --adam_eps 1e-8 --beta1 0.9 --beta2 0.999 --lora_r 64 --lora_alpha 192
--lora_dropout 0.01 --load_model MODEL --data_file DATA --devices 1 --accumulate_grad_batches 2
--proj_dir PROJ --data_type binidx --lora --lora_parts=att,ffn,time,ln --strategy deepspeed_stage_2 --accelerator gpu
"""
"""What RWKV Runner's page hands to finetune/install-wsl-dep-and-train.sh, and what that adds."""

SFT = """--data_shuffle 0 --data_type sft --sft_field query response --sft_split "train[:1000]" """
"""scripts/run_sft.sh, which trains all weights."""

INFCTX = """--train_type infctx --chunk_ctx CHUNK --dataload pad --fla"""
"""demo/infctx.sh."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """World tokens in 20 documents, below the 50304 ids of the Pile's tokenizer."""
    prefix = tmp_path_factory.mktemp("data") / "minipile"
    random = np.random.RandomState(0)
    with BinIdxWriter(prefix, np.uint16, World()) as writer:
        for _ in range(20):
            writer.add(random.randint(1, 200, TOKENS // 20).astype(np.uint16))
    return prefix


@pytest.fixture
def script(rookery, data, tmp_path):
    """Runs `rookery train` with a published list, its capitals filled in."""

    def run(arguments: str, **values: object):
        values = {
            "PROJ": tmp_path / "out", "DATA": data, "CTX": CTX, "TOKENS": TOKENS, "PRIME": magic_prime(TOKENS, CTX),
            "LAYERS": 2, "WIDTH": 64, "EPOCHS": 2, "BATCH": 2, **values,
        }  # fmt: skip
        words = shlex.split(arguments)
        return rookery("train", *(values.get(word, word) for word in words))

    return run


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("prepare", "run", "version"),
    [
        (V5_PREPARE, V5_RUN, "x052"),
        (V5_PREPARE + "--my_testing x060", V5_RUN, "x060"),
        (V7_PREPARE, V7_RUN, "x070"),
        (PILE_PREPARE, PILE_RUN, "x070"),
    ],
    ids=["v5", "v6", "v7", "pile"],
)
def test_stage_1_and_stage_3(script, tmp_path, prepare: str, run: str, version: str) -> None:
    folder = tmp_path / "out"
    made = script(prepare)
    assert made.returncode == 0, made.stderr
    initial = read_weights(folder / "rwkv-init.pth")
    assert ModelShape.of_checkpoint({k: tuple(t.shape) for k, t in initial.items()}, "init").version == version
    assert {t.dtype for t in initial.values()} == {torch.bfloat16}

    trained = script(run, VERSION=version)
    said = trained.stdout + trained.stderr
    assert trained.returncode == 0, said
    assert said.count("the CPU trains instead of gpu") == 1
    assert said.count("deepspeed_stage_2 has nothing to share out") == 1
    losses = [row["loss"] for row in rows(folder)]
    assert len(losses) == -(-TOKENS // (CTX * (30 if run == PILE_RUN else 16)))
    assert losses[0] == pytest.approx(np.log(initial["head.weight"].shape[0]), abs=0.2)
    assert losses[-1] < losses[0] - 0.01
    final = read_weights(folder / "rwkv-final.pth")
    assert {k: (t.shape, t.dtype) for k, t in final.items()} == {k: (t.shape, t.dtype) for k, t in initial.items()}


def test_finetuning_without_a_model(script, tmp_path) -> None:
    result = script(FINETUNE, VERSION="x060")
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert "--accelerator xpu: this kind of device" in said
    assert len(rows(tmp_path / "out")) == 4


def write_base(file: Path, version: str) -> Path:
    """A model that passes something on: layers of an untrained one add nothing, so that little could learn in them."""
    ranks = {"mix": 32, "decay": 64} if version == "x060" else dict.fromkeys("wavg", 32)
    model = create(ModelShape(version, 2, 64, 65536, 64, 64, 224 if version == "x060" else 256, ranks))
    initialise(model, 0)
    grown = {k: torch.randn_like(t) * 0.05 if ".output." in k else t for k, t in model.state_dict().items()}
    write_pth(file, {k: t.bfloat16() for k, t in grown.items()})
    return file


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_state_tuning(script, tmp_path, version: str) -> None:
    result = script(STATE_TUNING, VERSION=version, MODEL=write_base(tmp_path / "base.pth", version))
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("rwkv-0.pth", "rwkv-1.pth", "rwkv-final.pth"):
        states = read_weights(tmp_path / "out" / name)
        assert set(states) == {f"blocks.{i}.att.time_state" for i in range(2)}
        assert {(t.dtype, tuple(t.shape)) for t in states.values()} == {(torch.bfloat16, (1, 64, 64))}
    assert all(t.abs().max() > 0 for t in states.values())
    assert len(rows(tmp_path / "out")) == 4


@pytest.mark.parametrize("method", ADAPTERS)
def test_adapters(script, tmp_path, method: str) -> None:
    base = write_base(tmp_path / "base.pth", "x060")
    result = script(_SLOW + ADAPTERS[method], VERSION="x060", MODEL=base)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ("nearest of what Rookery has" in result.stderr) == (method == "fp8")
    assert len(rows(tmp_path / "out")) == 4
    initial, final = (read_adapter(tmp_path / "out" / f"adapter-{name}.safetensors") for name in ("init", "final"))
    assert final.config.method == {"lora": "lora", "fp8": "lora", "pissa": "pissa"}.get(method, "miss")
    assert final.config.r == (32 if final.config.method in ("lora", "pissa") else 64)
    trained = [name for name in final.tensors if not torch.equal(final.tensors[name], initial.tensors[name])]
    assert trained
    assert (tmp_path / "out" / "rwkv-final.pth").exists() == (method == "miss"), "--merge 1 also writes the whole model"
    if method == "miss":
        merged, before = read_weights(tmp_path / "out" / "rwkv-final.pth"), read_weights(base)
        changed = {name for name in merged if not torch.equal(merged[name], before[name])}
        assert changed <= {name.replace(".disha", ".weight") for name in trained}
        assert changed


def test_the_start_script_of_runner(script, tmp_path) -> None:
    base = write_base(tmp_path / "base.pth", "x060")
    result = script(RUNNER, MODEL=base)
    assert result.returncode == 0, result.stdout + result.stderr
    config = read_adapter(tmp_path / "out" / "adapter-final.safetensors").config
    assert (config.method, config.r, config.alpha, config.dropout) == ("lora", 64, 192, 0.01)
    assert (config.targets, config.train_parts) == (("att", "ffn"), ("time", "ln"))


def test_sft(script, tmp_path) -> None:
    file = tmp_path / "sums.jsonl"
    lines = [json.dumps({"query": f"{i} + 1 = ?", "response": str(i + 1)}) for i in range(40)]
    file.write_text("\n".join(lines), encoding="utf-8")
    script_of_sft = _SLOW.replace("--data_type binidx", "") + SFT
    base = write_base(tmp_path / "base.pth", "x070")
    result = script(script_of_sft, VERSION="x070", MODEL=base, DATA=file, CTX=64)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "become conversations" in result.stderr
    assert len(rows(tmp_path / "out")) == 4
    assert read_weights(tmp_path / "out" / "rwkv-final.pth").keys() == read_weights(base).keys()


def test_infinite_context(script, tmp_path) -> None:
    base = write_base(tmp_path / "base.pth", "x070")
    whole = script(_SLOW + "--dataload pad", VERSION="x070", MODEL=base, PROJ=tmp_path / "whole")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    result = script(_SLOW + INFCTX, VERSION="x070", MODEL=base, CHUNK=6)
    assert result.returncode == 0, result.stdout + result.stderr
    first = rows(tmp_path / "out")[0]["loss"]
    assert first == pytest.approx(rows(tmp_path / "whole")[0]["loss"], abs=2e-2), "bf16 rounds in other places"
    assert len(rows(tmp_path / "out")) == 4
