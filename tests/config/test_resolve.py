"""What is left open is decided by checkpoint, data, machine and rules, and each value says by which."""

from __future__ import annotations

from typing import Any

import pytest

from rookery.config import TrainConfig, differences, parse, resolve, to_toml
from rookery.config.tree import SECTION_OF, get
from rookery.errors import UserError

MODEL = {
    "file": "rwkv7-g1-0.4b.pth",
    "version": "x070",
    "n_layer": 24,
    "n_embd": 1024,
    "dim_att": 1024,
    "dim_ffn": 4096,
    "head_size": 64,
    "vocab_size": 65536,
    "ranks": {"w": 64, "a": 64, "v": 32, "g": 128},
}
DATA = {
    "file": "data/minipile",
    "data_type": "binidx",
    "tokenizer": "world",
    "vocab_size": 65536,
    "exit_tokens": 1498226207,
    "prime": 2926181,
    "sampler": "cubic",
    "samples": 2926181,
}
ROWS = DATA | {"file": "chat.jsonl", "prime": 0, "exit_tokens": 300 * 512, "sampler": "documents", "samples": 100}

GPU = {"accelerator": "cuda", "name": "NVIDIA A100", "bf16": True}


def test_everything_is_concrete_and_has_an_origin() -> None:
    config, origins, _ = resolve(
        parse(["--ctx_len", "512", "--micro_bsz", "16"]).config, data_facts=DATA, device_facts=GPU
    )
    open_leaves = {leaf for leaf in SECTION_OF if get(config, leaf) is None}
    assert open_leaves == {"save_every", "mask_id", "sft_field", "target_modules", "tiny_att_layer", "my_exit"}
    assert origins.keys() == SECTION_OF.keys()
    assert (config.model.version, config.model.n_layer, config.model.n_embd) == ("x070", 6, 512)
    assert (config.run.precision, config.device.accelerator, config.device.strategy) == ("bf16", "cuda", "single")
    assert (config.data.magic_prime, config.data.my_exit_tokens, config.data.data_type) == (
        2926181,
        1498226207,
        "binidx",
    )
    assert (config.run.epoch_steps, config.run.epoch_count) == (2520, 73)
    assert (config.optim.lr_init, config.optim.lr_final, config.optim.adam_eps) == (9e-4, 8e-5, 1e-18)
    assert (config.optim.warmup_steps, config.run.random_seed) == (10, 0)
    assert config.log.run_name == "65536 ctx512 L6 D512"
    assert str(origins["lr_init"]) == "rule: 0.45/n_embd"
    assert str(origins["magic_prime"]) == "data: data/minipile"
    assert str(origins["precision"]) == "this machine: NVIDIA A100"
    assert str(origins["ctx_len"]) == "given by the program"


def test_the_checkpoint_decides_the_architecture() -> None:
    config, origins, _ = resolve(TrainConfig(), model_facts=MODEL)
    assert (config.model.n_layer, config.model.n_embd, config.model.gate_low_rank_dim) == (24, 1024, 128)
    assert config.optim.lr_init == 4e-4
    assert str(origins["v_low_rank_dim"]) == "checkpoint: rwkv7-g1-0.4b.pth"


def test_flags_that_agree_with_the_checkpoint_are_welcome() -> None:
    parsed = parse(["--n_layer", "24", "--n_embd", "1024", "--my_testing", "x070", "--vocab_size", "65536"])
    config, origins, _ = resolve(parsed.config, parsed.origins, model_facts=MODEL)
    assert config.model.n_layer == 24
    assert str(origins["n_layer"]) == "--n_layer 24"


def test_flags_that_disagree_with_the_checkpoint_are_listed_with_both_sides() -> None:
    parsed = parse(["--n_layer", "12", "--n_embd", "768", "--decay_low_rank_dim", "96", "--head_size", "32"])
    with pytest.raises(UserError) as failure:
        resolve(parsed.config, parsed.origins, model_facts=MODEL)
    assert str(failure.value).splitlines()[1:-1] == [
        "  n_layer: 12 (--n_layer 12), the file has 24",
        "  n_embd: 768 (--n_embd 768), the file has 1024",
        "  head_size: 32 (--head_size 32), the file has 64",
        "  decay_low_rank_dim: 96 (--decay_low_rank_dim 96), the file has 64",
    ]


def test_a_vocabulary_that_only_the_data_suggest_must_fit_the_checkpoint_too() -> None:
    with pytest.raises(UserError, match="vocab_size: 416"):
        resolve(TrainConfig(), model_facts=MODEL, data_facts={**DATA, "vocab_size": 416})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # (my_exit_tokens, epoch_count) of a run of 10 steps a mini-epoch, 4 samples of 8 tokens a step
        ({}, (6400, 20)),
        ({"my_exit_tokens": 1000}, (1000, 4)),
        ({"epoch_count": 3}, (960, 3)),
        ({"epoch_count": 999999}, (6400, 20)),
        ({"epoch_count": 3, "my_exit_tokens": 640}, (640, 2)),
        ({"epoch_count": 3, "my_exit_tokens": 0}, (0, 3)),
        ({"my_exit_tokens": 0}, (0, 20)),
        ({"my_exit_tokens": -640}, (-640, 2)),
    ],
)
def test_the_length_of_a_run(given: dict[str, Any], expected: tuple[int, int]) -> None:
    asked = TrainConfig(ctx_len=8, micro_bsz=2, accumulate_grad_batches=2, epoch_steps=10, **given)
    config = resolve(asked, data_facts={**DATA, "exit_tokens": 6400, "prime": 797}).config
    assert (config.data.my_exit_tokens, config.run.epoch_count) == expected


def test_accumulation_counts_as_batch() -> None:
    one = resolve(TrainConfig(micro_bsz=16), data_facts=DATA).config.run.epoch_steps
    two = resolve(TrainConfig(micro_bsz=4, accumulate_grad_batches=4), data_facts=DATA).config.run.epoch_steps
    assert one == two == 2520


def test_what_cannot_be_had_is_said_and_replaced() -> None:
    parsed = parse(["--accelerator", "gpu", "--strategy", "deepspeed_stage_2", "--dim_ffn", "1792", "--n_embd", "512"])
    config, _, notes = resolve(parsed.config, parsed.origins)
    assert (config.device.accelerator, config.device.strategy, config.model.dim_ffn) == ("cpu", "single", 2048)
    assert len(notes) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_embd", "96"], "time mixing is 96 wide, which is not a multiple of head_size 64"),
        (["--n_embd", "128", "--dim_att", "64"], "in x070 dim_att is n_embd"),
        (["--micro_bsz", "11"], "make it 10 or 12"),
        (["--quant", "nf4"], "add --peft lora"),
        (["--peft", "state", "--adapter_load", "a.safetensors"], "adapter_load belongs to an adapter"),
        (["--train_parts", "ln"], "train_parts belongs to an adapter"),
        (["--early_stop", "3"], "give validation data with val_split or val_file"),
    ],
)
def test_settings_that_contradict_each_other(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(parse(flags).config)


@pytest.mark.parametrize(("peft", "rates"), [("state", (1.0, 0.01)), ("lora", (5e-5, 5e-5)), ("miss", (5e-5, 5e-5))])
def test_fine_tuning_has_rates_of_its_own_and_says_so(peft: str, rates: tuple[float, float]) -> None:
    config, _, notes = resolve(parse(["--peft", peft]).config, model_facts=MODEL)
    assert (config.optim.lr_init, config.optim.lr_final, config.optim.warmup_steps) == (*rates, 10)
    assert [note.split(" is ")[0] for note in notes] == ["lr_init", "lr_final"]
    assert resolve(parse(["--peft", peft, "--lr_init", "0.5", "--lr_final", "0.5"]).config).notes == []


@pytest.mark.parametrize(
    ("flags", "left_out"),
    [
        ("--peft pissa --lora_r 8 --lora_alpha 16 --rslora", ["lora_alpha", "rslora"]),
        ("--peft miss --lora_plus_ratio 16", ["lora_plus_ratio"]),
        ("--peft state --merge 1", ["merge"]),
        ("--merge 1", ["merge"]),
        ("--peft lora --merge 1 --lora_plus_ratio 16 --rslora", []),
    ],
)
def test_what_a_method_has_not_is_left_out_and_said(flags: str, left_out: list[str]) -> None:
    words = [*flags.split(), "--lr_init", "1", "--lr_final", "1"]
    config, _, notes = resolve(parse(words).config)
    assert [note.split(" has no ")[1].split(":")[0] for note in notes] == left_out
    assert resolve(config).notes == []


@pytest.mark.parametrize("method", ["pissa", "miss"])
def test_an_adapter_is_gone_on_with_by_the_flags_it_began_with(method: str) -> None:
    """Also by those that its method has not."""
    facts = {"file": "adapter-init.safetensors", "peft": method, "lora_r": 8, "lora_alpha": 8.0, "rslora": False,
             "miss_mode": "bone", "target_modules": None, "train_parts": []}  # fmt: skip
    config = parse(["--peft", method, "--lora_r", "8", "--lora_alpha", "16", "--rslora"]).config
    assert resolve(config, adapter_facts=facts).config == resolve(config).config


def test_a_step_takes_no_more_documents_than_there_are() -> None:
    def resolved(*flags: str) -> Any:
        facts = GPU | {"free": 80 << 30}
        return resolve(parse(["--n_layer", "6", "--n_embd", "256", *flags]).config, data_facts=ROWS, device_facts=facts)

    assert resolved("--micro_bsz", "auto").config.run.micro_bsz == 100
    assert resolved("--micro_bsz", "auto", "--accumulate_grad_batches", "4").config.run.micro_bsz == 25
    assert resolved("--micro_bsz", "100").notes == []
    assert ["read several times in a step" in note for note in resolved("--micro_bsz", "101").notes] == [True]


def test_the_largest_batch_that_fits() -> None:
    def batch(free: int, *flags: str) -> int:
        words = ["--micro_bsz", "auto", "--n_layer", "12", "--n_embd", "768", *flags]
        return resolve(parse(words).config, data_facts=DATA, device_facts=GPU | {"free": free}).config.run.micro_bsz

    small, large = batch(8 << 30), batch(24 << 30)
    assert 1 <= small < large
    assert 40320 % small == 40320 % large == 0
    assert batch(24 << 30, "--grad_cp", "1") > large
    with pytest.raises(UserError, match="give a number"):
        resolve(parse(["--micro_bsz", "auto"]).config, data_facts=DATA)


def test_a_mini_epoch_of_documents_is_one_pass() -> None:
    config = resolve(parse(["--micro_bsz", "8", "--ctx_len", "512"]).config, data_facts=ROWS).config
    assert (config.run.epoch_steps, config.data.my_exit_tokens, config.run.epoch_count) == (13, 300 * 512, 3)


def test_several_devices_share_by_ddp_unless_told() -> None:
    assert resolve(TrainConfig(devices=2)).config.device.strategy == "ddp"
    assert resolve(TrainConfig(devices=2, strategy="fsdp")).config.device.strategy == "fsdp"


def test_resolving_again_changes_nothing() -> None:
    first = resolve(TrainConfig(ctx_len=64), data_facts=DATA, device_facts=GPU)
    again = resolve(first.config, first.origins, data_facts=DATA, device_facts=GPU)
    assert again == first._replace(notes=[])


@pytest.mark.parametrize("comments", [True, False])
def test_toml_reads_back_exactly(tmp_path: Any, comments: bool) -> None:
    awkward = 'C:\\run "1"\t中文\x7f'
    asked = TrainConfig(proj_dir=awkward, mask_id={"mask0": '"', "mask 1": "\n"}, tensorboard=True, lr_init=1e-18)
    config, origins, _ = resolve(asked, data_facts=DATA)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config, comments=comments, origins=origins), encoding="utf-8")
    assert parse([str(file)]).config == config
    assert ("0.04/n_embd" in file.read_text(encoding="utf-8")) == comments


def test_what_may_change_between_sessions() -> None:
    before = resolve(TrainConfig(micro_bsz=16), data_facts=DATA).config

    def changed(**values: Any) -> list[str]:
        after = resolve(TrainConfig(**{"micro_bsz": 16, **values}), data_facts=DATA).config
        return [difference.leaf for difference in differences(before, after)]

    assert changed(wandb="project", save_every=7, grad_cp=1, kernel="chunked", epoch_save=5) == []
    assert changed(micro_bsz=4, accumulate_grad_batches=4) == [], "the samples of a step are the same"
    assert changed(micro_bsz=8) == ["micro_bsz", "epoch_steps"]
    assert changed(lr_init=1e-5, ctx_len=512) == ["ctx_len", "lr_init", "epoch_count"]
    assert [*differences(before, before)] == []


def test_a_run_that_only_wrote_initial_weights_ties_nobody() -> None:
    before = resolve(TrainConfig(train_stage=1, micro_bsz=1, lr_init=1e-5)).config
    assert differences(before, resolve(TrainConfig(micro_bsz=16), data_facts=DATA).config) == []


def test_what_keeps_less_in_memory_and_what_it_needs() -> None:
    lean = TrainConfig(optimizer="adamw8bit", master_weights=0, offload_activations=1)
    config, origins, notes = resolve(lean, device_facts=GPU)
    assert (config.optim.master_weights, config.run.precision, config.run.grad_cp) == (0, "bf16", 1)
    assert origins["grad_cp"].kind == "rule"
    assert any("grad_cp is 1" in note for note in notes)
    config, _origins, notes = resolve(TrainConfig(master_weights=0))
    assert config.optim.master_weights == 1
    assert any("fp32" in note for note in notes)
    with pytest.raises(UserError, match="precision bf16"):
        resolve(TrainConfig(master_weights=0, precision="fp16"))
    several = {"devices": 2, "precision": "bf16", "epoch_steps": 1, "strategy": "deepspeed_stage_2"}
    with pytest.raises(UserError, match="leave out --optimizer adamw8bit --master_weights 0, or take --strategy fsdp"):
        resolve(TrainConfig(optimizer="adamw8bit", master_weights=0, **several), device_facts=GPU)
    resolve(TrainConfig(optimizer="adamw8bit", **{**several, "strategy": "fsdp"}), device_facts=GPU)


@pytest.mark.parametrize("words", [["--optim", "adamw_8bit"], ["--optimizer", "AdamW8bit"], ["--optimizer=adamw8bit"]])
def test_names_of_the_8_bit_optimiser(words: list[str]) -> None:
    assert parse(words).config.optim.optimizer == "adamw8bit"
    assert parse(["--optim", "none"]).config.optim.optimizer == "adamw"
