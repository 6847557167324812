"""Flags and TOML become a configuration that knows where each value came from."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rookery.config import TrainConfig, parse
from rookery.config.tree import SECTION_OF, OptimSection, section_model
from rookery.errors import UserError


def words(text: str) -> list[str]:
    return shlex.split(text)


def test_leaf_names_are_unique() -> None:
    leaves = [leaf for section in TrainConfig.model_fields for leaf in section_model(section).model_fields]
    assert len(leaves) == len(set(leaves)) == len(SECTION_OF)
    assert not set(leaves) & set(TrainConfig.model_fields), (
        "a section and a leaf of one name would be ambiguous in TOML"
    )


def test_flat_and_nested_keys_mix_and_the_callers_values_stay_as_they_were() -> None:
    given = {"optim": {"beta1": 0.8}, "beta2": 0.95, "ctx_len": 7}
    config = TrainConfig(**given)
    assert (config.optim.beta1, config.optim.beta2, config.data.ctx_len) == (0.8, 0.95, 7)
    assert given == {"optim": {"beta1": 0.8}, "beta2": 0.95, "ctx_len": 7}


def test_a_flat_key_goes_over_a_section_object() -> None:
    section = OptimSection(beta1=0.8, beta2=0.9)
    config = TrainConfig(optim=section, beta2=0.95)
    assert (config.optim.beta1, config.optim.beta2) == (0.8, 0.95)
    assert section.beta2 == 0.9
    assert config.optim.model_fields_set == {"beta1", "beta2"}


def test_flags_go_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "# a comment\nmicro_bsz = 3\n[data]\nctx_len = 128\n\n[optim]\nlr_init = 1e-3\n", encoding="utf-8"
    )
    config, origins, notes = parse([str(recipe), "--ctx-len", "256", "--grad_cp=1"])
    assert (config.data.ctx_len, config.optim.lr_init, config.run.micro_bsz, config.run.grad_cp) == (256, 1e-3, 3, 1)
    assert str(origins["ctx_len"]) == "--ctx-len 256"
    assert str(origins["lr_init"]) == f"{recipe}:7"
    assert str(origins["micro_bsz"]) == f"{recipe}:2"
    assert origins["beta1"].kind == "default"
    assert origins.keys() == SECTION_OF.keys()
    assert notes == []
    assert parse(["--config", str(recipe)]).config == parse([], recipe).config


def test_lines_are_found_behind_texts_of_many_lines_and_in_dotted_and_inline_tables(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'log = { wandb = """a\nctx_len = 1\n""" }\noptim.lr_init = 2\n"beta1" = 0.5\n[ run ]\nproj_dir = "x"\n',
        encoding="utf-8",
    )
    origins = parse([str(recipe)]).origins
    lines = {leaf: str(origins[leaf]).rpartition(":")[2] for leaf in ("wandb", "lr_init", "beta1", "proj_dir")}
    assert lines == {"wandb": "1", "lr_init": "4", "beta1": "5", "proj_dir": "7"}


@pytest.mark.parametrize(
    ("flags", "leaf", "value"),
    [
        ("--warmup_steps -1", "warmup_steps", -1),
        ("--lr_init 6e-4", "lr_init", 6e-4),
        ("--weight_decay_final -1.0", "weight_decay_final", -1.0),
        ('--wandb ""', "wandb", ""),
        ("--wandb Test", "wandb", "Test"),
        ("--tensorboard", "tensorboard", True),
        ("--tensorboard False", "tensorboard", False),
        ("--tensorboard --n_layer 2", "n_layer", 2),
        ("--train_stage 2", "train_stage", 2),
        ("""--mask_id '{"mask0": "a b", "mask1": "c"}'""", "mask_id", {"mask0": "a b", "mask1": "c"}),
        ("--ctx_len 1 --ctx_len 2", "ctx_len", 2),
        ("--my_exit_tokens -100", "my_exit_tokens", -100),
        # as the scripts of other trainers write it
        ("--load_model 0", "load_model", ""),
        ("--my_testing x060", "version", "x060"),
        ("--head_size_a 32", "head_size", 32),
        ("--my_pile_stage 2", "train_stage", 2),
        ("--dim_att 0", "dim_att", None),
        ("--magic_prime 0", "magic_prime", None),
        ("--precision bf16-mixed", "precision", "bf16"),
        ("--precision 32", "precision", "fp32"),
        ("--epoch_count 999999", "epoch_count", None),
        ("--kernel @rwkv3", "kernel", "auto"),
        ("--kernel --n_layer 2", "kernel", "auto"),
        ("--op triton", "kernel", "triton"),
        ("--op fla", "kernel", "fla"),
        ("--fla", "kernel", "fla"),
        ("--gradient_clip_val 0.5", "grad_clip", 0.5),
        ("--micro_bsz auto", "micro_bsz", 0),
        ("--quant Int8", "quant", "int8"),
        ("--peft bone", "peft", "miss"),
        ("--train_type states", "peft", "state"),
        ("--train_type infctx", "train_type", "infctx"),
        ("--train_type none", "train_type", "normal"),
        ('--train_parts "time" "ln"', "train_parts", ["time", "ln"]),
        ("--train_parts [time,ln]", "train_parts", ["time", "ln"]),
        ("--train_parts []", "train_parts", []),
        ("--target_modules att.key,ffn.value", "target_modules", ["att.key", "ffn.value"]),
        ("--sft_field query response", "sft_field", ["query", "response"]),
        ("""--lora_config '{"lora_load":"","lora_r":8,"lora_alpha":32}' --peft lora""", "lora_alpha", 32.0),
        ("""--peft disha --disha_config '{"mode":"bat","load":"","r":4}'""", "miss_mode", "bat"),
        ("""--peft pissa --pissa_config '{"pissa_init":"i.pth","svd_niter":2}'""", "pissa_init", "i.pth"),
        ("""--peft miss --lora_config '{"lora_r":8}'""", "lora_r", 64),
        ("--lora", "peft", "lora"),
        ("--lora", "lora_alpha", 32.0),
        ("--lora --lora_r 64", "lora_r", 64),
        ("--lora", "target_modules", ["att"]),
        ("--lora --lora_load l.pth", "adapter_load", "l.pth"),
        ("--lora --lora_parts=att,ffn,time,ln", "target_modules", ["att", "ffn"]),
        ("--lora_parts=att,ffn,time,ln --lora", "train_parts", ["time", "ln"]),
        ("--lora --lora_parts att,ffn", "train_parts", []),
        ("--emb --lora", "train_parts", ["ln", "time", "emb", "head"]),
        ("--emb --lora --lora_parts=att,ln", "train_parts", ["ln", "emb", "head"]),
        (
            """--peft lora --peft_config '{"r":8,"target_modules":["key","value"]}'""",
            "target_modules",
            ["key", "value"],
        ),
    ],
)
def test_a_flag_gives_its_leaf_a_value(flags: str, leaf: str, value: object) -> None:
    config = parse(words(flags)).config
    assert getattr(getattr(config, SECTION_OF[leaf]), leaf) == value


def test_a_flag_can_leave_open_what_the_recipe_gives(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("[model]\ndim_att = 512\n", encoding="utf-8")
    config, origins, _ = parse([str(recipe), "--dim_att", "0"])
    assert config.model.dim_att is None
    assert origins["dim_att"].kind == "default"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ctx_lne 5", "--ctx_lne is not a flag of rookery train; did you mean --ctx_len?"),
        ("--my-testng x070", "--my-testng is not a flag of rookery train; did you mean --my_testing?"),
        ("--zzzzzzz 1", "--zzzzzzz is not a flag of rookery train; `rookery train --help` lists them"),
        ("--ctx_len", "--ctx_len needs a value"),
        ("--ctx_len --n_layer 3", "--ctx_len needs a value"),
        ("--precision bf61", "--precision bf61: must be one of fp32, tf32, fp16, bf16; did you mean bf16?"),
        ("--my_testing x071", "--my_testing x071: must be one of x052, x060, x070; did you mean x070?"),
        ("--train_stage 7", "--train_stage 7: must be one of 0, 1, 2, 3, 4"),
        ("--n_embd 100", "--n_embd 100: must be a multiple of 32, such as 96 / 128"),
        ("--n_embd 0", "--n_embd 0: must be at least 32"),
        ("--beta1 1", "--beta1 1: must be less than 1"),
        ("--ctx_len 12x", "--ctx_len 12x: must be a whole number, such as 1024"),
        ("--lr_init fast", "--lr_init fast: must be a number, such as 0.0006"),
        ("--tensorboard maybe", "--tensorboard maybe: must be true or false"),
        ("--mask_id x", """--mask_id x: must be JSON, such as '{"mask0": "0", "mask1": "1"}'"""),
        ("--n_layer 0 --n_embd 1", "--n_layer 0: must be at least 1\n--n_embd 1: must be a multiple of 32, such as 32"),
        (
            "corpus.jsonl",
            "corpus.jsonl belongs to no flag; a recipe ends in .toml, and a value with spaces needs quotes",
        ),
        ("a.toml b.toml", "two recipes are given: a.toml and b.toml"),
        ("nowhere.toml", "nowhere.toml does not exist"),
        ("--peft loar", "--peft loar: must be one of none, state, lora, dora, pissa, miss; did you mean lora?"),
        ("--peft lora --lora_config r=8", "--lora_config must be a JSON object in quotes; it is r=8"),
        (
            """--peft lora --lora_config '{"rank":8}'""",
            "--lora_config has the keys lora_load, lora_r, lora_alpha, lora_dropout, and no rank",
        ),
        ("--dropout 1", "--dropout 1: must be less than 1"),
    ],
)
def test_a_bad_flag_is_named_with_what_was_probably_meant(flags: str, message: str) -> None:
    with pytest.raises(UserError) as failure:
        parse(words(flags))
    assert str(failure.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data]\nctx_lne = 5\n", "{file}:2: there is no setting ctx_lne; did you mean ctx_len?"),
        ("\n[optmi]\nlr_init = 1\n", "{file}:2: there is no setting optmi; did you mean optim?"),
        ("[optim]\nctx_len = 5\n", "{file}:2: ctx_len belongs in [data], not in [optim]"),
        ("[model]\nmy_testing = 'x070'\n", "{file}:2: there is no setting my_testing; did you mean version?"),
        ("zzzzzzz = 1\n", "{file}:1: there is no setting zzzzzzz; `rookery train --help` lists them"),
        ("[data]\nctx_len = 'long'\n", "{file}:2: ctx_len = 'long': must be a whole number, such as 1024"),
        (
            "[run]\nprecision = 'bf61'\n",
            "{file}:2: precision = 'bf61': must be one of fp32, tf32, fp16, bf16; did you mean bf16?",
        ),
        ("[log]\nwandb = 3\n", "{file}:2: wandb = 3: must be text"),
        ("ctx_len = 1\n[data]\nctx_len = 2\n", "{file}:3: ctx_len is given twice"),
        ("data = 3\n", "{file}:1: data is a section: write [data] and its settings below"),
        ("[data\n", "{file} is not valid TOML: Expected ']' at the end of a table declaration (at line 1, column 6)"),
    ],
)
def test_a_bad_recipe_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as failure:
        parse([str(recipe)])
    assert str(failure.value) == message.replace("{file}", str(recipe))


def test_what_other_trainers_do_differently_is_said_in_one_line_each() -> None:
    notes = parse(words("--fused_kernel --enable_progress_bar False --op cuda")).notes
    assert [note.split(":")[0] for note in notes] == [
        "--fused_kernel",
        "--enable_progress_bar False",
        "--op cuda",
    ]
    assert all("\n" not in note for note in notes)


RWKV_LM_V7 = """
--load_model "0" --wandb "" --proj_dir out/L12-D768-x070 --my_testing x070
--ctx_len 512 --train_stage 3 --epoch_count 999999 --epoch_begin 0
--data_file "data/minipile" --my_exit_tokens 1498226207 --magic_prime 2926181
--num_nodes 1 --micro_bsz 16 --n_layer 12 --n_embd 768 --kernel @rwkv3
--lr_init 6e-4 --lr_final 6e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-18 --data_type "binidx"
--vocab_size 65536 --weight_decay 0.001 --epoch_save 10 --head_size 64 --head_chunk 0
--accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1 --enable_progress_bar True
"""

RWKV_LM_V5_PREPARE = """
--wandb "" --proj_dir model/0.1-1 --data_file "data/minipile" --data_type "binidx" --vocab_size 65536
--ctx_len 512 --my_pile_stage 1 --epoch_count 1 --epoch_begin 0 --epoch_save 1 --weight_decay 0 --head_size_a 64
--num_nodes 1 --micro_bsz 1 --n_layer 12 --n_embd 768 --pre_ffn 0 --head_qk 0 --my_exit_tokens 1498226207
--magic_prime 2926181 --lr_init 1e-5 --lr_final 1e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8
--my_pile_edecay 0 --accelerator cpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 0
--enable_progress_bar False --ds_bucket_mb 200
"""


def test_the_published_scripts_are_understood() -> None:
    config, origins, notes = parse(words(RWKV_LM_V7))
    assert (config.model.version, config.run.train_stage, config.data.magic_prime) == ("x070", 3, 2926181)
    assert (config.device.strategy, config.run.precision, config.model.load_model) == ("deepspeed_stage_2", "bf16", "")
    assert [note.split(":")[0] for note in notes] == ["--kernel @rwkv3"]
    assert str(origins["version"]) == "--my_testing x070"

    config, _, notes = parse(words(RWKV_LM_V5_PREPARE))
    assert (config.run.train_stage, config.run.epoch_count, config.model.head_size) == (1, 1, 64)
    assert [note.split(":")[0] for note in notes] == ["--enable_progress_bar False"]


@given(
    st.lists(st.text(max_size=8) | st.sampled_from(["--ctx_len", "--fla", "--mask_id", "--sft_field", "-1", "=", "--"]))
)
def test_no_words_do_anything_but_parse_or_be_refused(some: list[str]) -> None:
    with contextlib.suppress(UserError):
        parse(some)
