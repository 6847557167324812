"""The form: every setting, Runner's defaults, and text that goes to TOML, to a command and back."""

from __future__ import annotations

import shlex

import pytest

from rookery.config import parse
from rookery.config.tree import SECTION_OF, get
from rookery.errors import UserError
from rookery.ui import form
from rookery.ui.places import OutsideError, Places


@pytest.fixture
def places(tmp_path) -> Places:
    return Places([tmp_path])


def test_every_setting_has_its_field() -> None:
    """A new leaf of the tree appears by itself, with its help, default and check."""
    schema = form.schema()
    assert schema["fields"].keys() == SECTION_OF.keys()
    assert [leaf for section in schema["sections"] for leaf in section["leaves"]] == list(SECTION_OF)
    assert all(field["help"] for field in schema["fields"].values())
    shown = [leaf for group in schema["groups"].values() for leaf in group]
    assert set(shown) <= SECTION_OF.keys()
    assert schema["fields"]["grad_cp"]["kind"] == "switch"
    assert schema["fields"]["precision"]["choices"] == ["fp32", "tf32", "fp16", "bf16"]
    assert schema["fields"]["n_embd"]["limits"] == {"ge": 32, "multiple_of": 32}


def test_fine_tuning_begins_with_the_values_of_rwkv_runner() -> None:
    """The table of Runner's training page, in its order."""
    expected = (
        "devices=1 precision=bf16 grad_cp=1 ctx_len=1024 epoch_steps=200 epoch_count=20 epoch_begin=0 epoch_save=1 "
        "lr_init=5e-5 lr_final=5e-5 micro_bsz=1 accumulate_grad_batches=8 warmup_steps=0 adam_eps=1e-8 beta1=0.9 "
        "beta2=0.999 lora_r=64 lora_alpha=192 lora_dropout=0.01 pre_ffn=0 head_qk=0"
    )
    table = dict(pair.split("=") for pair in expected.split())
    assert list(form.GROUPS["training"]) == list(table)
    assert {leaf: form.defaults("lora")[leaf] for leaf in table} == table


@pytest.mark.parametrize("method", form.METHODS)
def test_the_defaults_of_a_method_are_valid_and_give_it(method: str) -> None:
    values = form.given(form.defaults(method) | {"load_model": "" if method == "pretrain" else "base.pth"})
    assert form.check(values) == {}
    assert form.method_of(values) == method


def test_values_go_to_toml_and_to_a_command_and_back(tmp_path) -> None:
    values = {
        "data_file": "my data/数据", "ctx_len": "512", "lr_init": "6e-4", "peft": "lora", "grad_cp": "1", "rslora": "1",
        "target_modules": "att.key ffn.value", "mask_id": '{"mask0": "0", "mask1": "1"}', "version": "x060",
    }  # fmt: skip
    (tmp_path / "recipe.toml").write_text(form.toml(values), encoding="utf-8")
    by_file = parse([], tmp_path / "recipe.toml").config
    words = shlex.split(form.command(values))
    assert words[:2] == ["rookery", "train"]
    assert parse(words[2:]).config == by_file
    assert by_file.data.data_file == "my data/数据"
    assert by_file.adapter.target_modules == ["att.key", "ffn.value"]
    assert form.read_recipe(form.toml(values)) == values
    assert form.read_recipe(form.command(values)) == values


def test_only_what_is_given_is_written() -> None:
    assert form.toml({"ctx_len": "64", "lora_r": "8"}) == "[data]\nctx_len = 64\n\n[adapter]\nlora_r = 8\n"


def test_what_stands_in_an_open_field_is_given_even_where_it_is_the_default() -> None:
    """State tuning would take another context length than the one that is seen."""
    shown = form.defaults("state") | {"ctx_len": "1024", "head_size": "64"}
    assert form.given(shown)["ctx_len"] == "1024"
    assert "head_size" not in form.given(shown), "a setting under Advanced keeps its rule until it is changed"


def test_a_command_of_another_trainer_fills_the_form() -> None:
    script = """
        python train.py --load_model "/models/RWKV-x070.pth" --proj_dir out --data_file data/sample \\
          --vocab_size 65536 --n_layer 24 --n_embd 2048 --data_type binidx --dataload pad --loss_mask pad \\
          --ctx_len 512 --micro_bsz 8 --epoch_steps 200 --epoch_count 4 --epoch_save 1 --lr_init 2e-5 --lr_final 2e-5 \\
          --accelerator gpu --precision bf16 --devices 1 --strategy deepspeed_stage_1 --grad_cp 1 \\
          --my_testing "x070" --peft lora --lora_config '{"lora_r":32,"lora_alpha":64,"lora_dropout":0.05}'"""
    values = form.read_recipe(script)
    assert values["load_model"] == "/models/RWKV-x070.pth"
    assert (values["version"], values["lora_r"], values["lora_dropout"]) == ("x070", "32", "0.05")
    assert form.method_of(values) == "lora"


def test_faults_are_told_field_by_field() -> None:
    wrong = form.check({"ctx_len": "0", "n_embd": "33", "precision": "bf61", "lr_init": "fast", "n_layer": "2"})
    assert wrong["ctx_len"] == "must be at least 1"
    assert wrong["n_embd"] == "must be a multiple of 32, such as 32 / 64"
    assert "did you mean bf16?" in wrong["precision"]
    assert wrong["lr_init"].startswith("must be a number")
    assert "n_layer" not in wrong


def test_a_recipe_with_a_fault_names_the_line_and_not_our_temporary_file() -> None:
    with pytest.raises(UserError, match=r"^recipe.toml:2: there is no setting ctx_lem; did you mean ctx_len"):
        form.read_recipe("[data]\nctx_lem = 5\n")


@pytest.mark.parametrize("leaf", [*form.PATHS, "tokenizer"])
def test_no_path_of_the_form_leaves_the_folders(places, leaf: str) -> None:
    with pytest.raises(OutsideError):
        form.read({leaf: "../../etc/passwd"}, places)


def test_what_is_no_setting_is_refused(places) -> None:
    with pytest.raises(UserError, match="no setting"):
        form.read({"rm": "-rf"}, places)
    with pytest.raises(UserError, match="no setting"):
        form.read({"ctx_len": ["512"]}, places)


def test_values_of_a_config_come_back_as_their_text() -> None:
    config = parse(["--lr_init", "6e-4", "--lora_alpha", "192", "--rslora", "--mix", "a:0.1", "b:0.2"]).config
    texts = {leaf: form.as_text(get(config, leaf)) for leaf in SECTION_OF}
    assert (texts["lr_init"], texts["lora_alpha"], texts["rslora"], texts["mix"]) == (
        "6e-4",
        "192",
        "1",
        "a:0.1 b:0.2",
    )
    assert parse(form.words(form.given(texts))).config == config
