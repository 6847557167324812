"""Flags of the reference trainers that are not leaves of the configuration, and values they write differently.

One table, so that an existing script runs unchanged when `python train.py` becomes `rookery train`. Each entry either
gives its value to a leaf (perhaps under another name), or is answered in one line that says what happens instead, or is
refused because going on would train something else than was asked for. The documentation page of flags is made from it.

The trainers: v5 = RWKV-LM/RWKV-v5, v7 = RWKV-LM/RWKV-v7/train_temp and RWKV-LM-V7, peft = RWKV-PEFT (both trees),
pl = the PyTorch Lightning 1.9 Trainer, whose flags the first three take over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from rookery.i18n import N_

Arity = Literal["one", "none", "optional", "many"]

NOT_GIVEN = ""
"""In `LegacyFlag.values`: the reference's way of saying "not given"."""


@dataclass(frozen=True)
class LegacyFlag:
    """One flag of the reference trainers.

    Attributes:
        tools: the trainers that have it.
        leaf: the leaf that takes the value; empty = none does.
        values: reference spelling -> ours, for a `leaf`; values not named here are passed on.
        silent: values that ask for what Rookery does anyway, so nothing needs saying.
        answer: what happens instead (one sentence), for every other value; with a `leaf`, for the values it respells.
        refused: whether `answer` is an error.
        arity: how many words follow the flag.
    """

    tools: str
    leaf: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    answer: str = ""
    refused: bool = False
    arity: Arity = "one"


_AUTO = N_("Rookery chooses the kernel of each call itself; `rookery doctor` says which and why")
_LIGHTNING = N_("this setting of PyTorch Lightning does nothing here: Rookery has its own training loop")
_OWN_ADAPTERS = N_("LoRA, PiSSA, DoRA and MiSS come with a later version of Rookery; this one trains all weights")
_OWN_MODEL_PARTS = N_("this part of the RWKV-5 and RWKV-6 trainer comes with a later version of Rookery")
_OWN_DATA_PARTS = N_("this way of reading data comes with a later version of Rookery")
_STATE = N_("state tuning and infinite context come with a later version of Rookery")
_QUANT = N_("quantised base weights come with a later version of Rookery")
_SFT = N_("write the examples as .jsonl lines with a text field and train with --loss_mask qa")

_LIGHTNING_OFF = ("false", "none", "0", "0.0", "-1", "")

LEGACY: dict[str, LegacyFlag] = {
    # Values that the reference spells differently.
    "load_model": LegacyFlag("v5 v7 peft", leaf="load_model", values={"0": ""}),
    "dim_att": LegacyFlag("v5 v7 peft", leaf="dim_att", values={"0": NOT_GIVEN}),
    "dim_ffn": LegacyFlag("v5 v7 peft", leaf="dim_ffn", values={"0": NOT_GIVEN}),
    "magic_prime": LegacyFlag("v5 v7 peft", leaf="magic_prime", values={"0": NOT_GIVEN}),
    "epoch_count": LegacyFlag("v5 v7 peft", leaf="epoch_count", values={"999999": NOT_GIVEN}),
    "precision": LegacyFlag(
        "v5 v7 peft pl",
        leaf="precision",
        values={
            "bf16-mixed": "bf16",
            "bf16-true": "bf16",
            "16": "fp16",
            "16-mixed": "fp16",
            "32": "fp32",
            "32-true": "fp32",
        },
    ),
    "strategy": LegacyFlag(
        "v5 v7 peft pl",
        leaf="strategy",
        values={
            "single-device": "single",
            "single_device": "single",
            "deepspeed": "deepspeed_stage_2",
            "ddp_find_unused_parameters_false": "ddp",
        },
    ),
    "kernel": LegacyFlag(
        "v7", leaf="kernel", values={"": "auto", "@rwkv3": "auto"}, silent=("",), answer=_AUTO, arity="optional"
    ),
    # Renamed.
    "my_testing": LegacyFlag("v5 v7 peft", leaf="version", values={"": NOT_GIVEN}),
    "rwkv_version": LegacyFlag("peft", leaf="version"),
    "head_size_a": LegacyFlag("v5 peft", leaf="head_size"),
    "my_pile_stage": LegacyFlag("v5 peft", leaf="train_stage"),
    "gradient_clip_val": LegacyFlag("pl", leaf="grad_clip", values={"None": NOT_GIVEN}),
    "op": LegacyFlag(
        "peft",
        leaf="kernel",
        values={"cuda": "auto", "fla": "auto"},
        answer=_AUTO,
    ),
    # What is done anyway, or by itself.
    "enable_progress_bar": LegacyFlag(
        "v7 pl",
        silent=("True", "1", "true"),
        answer=N_("the progress display shows itself on a terminal only; elsewhere plain lines are printed"),
    ),
    "ds_bucket_mb": LegacyFlag("v5 v7 peft", answer=N_("the bucket size of DeepSpeed is chosen by Rookery")),
    "compile": LegacyFlag("v7 peft", silent=("0",), answer=_AUTO, arity="optional"),
    "fla": LegacyFlag("peft", answer=_AUTO, arity="none"),
    "fla_npu": LegacyFlag("peft", answer=_AUTO, arity="none"),
    "fused_kernel": LegacyFlag("peft", answer=_AUTO, arity="none"),
    "optim": LegacyFlag(
        "peft",
        silent=("none", "adamw"),
        answer=N_("AdamW is the only optimiser; the reference's other ones did not run"),
        refused=True,
    ),
    "optimizer": LegacyFlag(
        "peft",
        silent=("none", "adamw"),
        answer=N_("AdamW is the only optimiser; the reference's other ones did not run"),
        refused=True,
    ),
    "avg_loss": LegacyFlag(
        "peft",
        silent=("0", "1"),
        answer=N_("the loss of an optimiser step is always the mean over its trained tokens"),
    ),
    "l2warp_sparse": LegacyFlag(
        "peft", silent=("0",), answer=N_("the L2 term on the largest logit is always added, in its current form")
    ),
    "data_shuffle": LegacyFlag(
        "peft", silent=("1",), answer=N_("the sampler's order is fixed by the data and the seed; nothing is reshuffled")
    ),
    "head_size_divisor": LegacyFlag(
        "v5 peft",
        silent=("8",),
        answer=N_("the divisor is always 8, as in every released model: the file does not record it"),
        refused=True,
    ),
    "my_pile_version": LegacyFlag("v5 peft", silent=("1",), answer=_OWN_DATA_PARTS, refused=True),
    "my_pile_shift": LegacyFlag("v5 peft", silent=("-1", "0"), answer=_OWN_DATA_PARTS, refused=True),
    "my_pile_edecay": LegacyFlag(
        "v5 peft",
        silent=("0",),
        answer=N_("it only bends the schedule used when my_exit_tokens is 0 or negative, which a later version brings"),
        refused=True,
    ),
    "my_exit": LegacyFlag(
        "v5 peft", silent=("99999999",), answer=N_("use --epoch_count to say where to stop"), refused=True
    ),
    "my_sample_len": LegacyFlag("v5 peft", silent=("0",), answer=_OWN_DATA_PARTS, refused=True),
    "my_qa_mask": LegacyFlag("v5 peft", silent=("0",), answer=_OWN_DATA_PARTS, refused=True),
    "my_random_steps": LegacyFlag("v5 peft", silent=("0",), answer=_OWN_DATA_PARTS, refused=True),
    "my_ffn_shift": LegacyFlag(
        "v5 peft", silent=("1",), answer=N_("no published code reads this flag: token shift is always on")
    ),
    "my_att_shift": LegacyFlag(
        "v5 peft", silent=("1",), answer=N_("no published code reads this flag: token shift is always on")
    ),
    "my_pos_emb": LegacyFlag("v5 peft", silent=("0",), answer=_OWN_MODEL_PARTS, refused=True),
    "pre_ffn": LegacyFlag("v5 peft", silent=("0",), answer=_OWN_MODEL_PARTS, refused=True),
    "head_qk": LegacyFlag("v5 peft", silent=("0",), answer=_OWN_MODEL_PARTS, refused=True),
    "tiny_att_dim": LegacyFlag("v5 peft", silent=("0", "-1"), answer=_OWN_MODEL_PARTS, refused=True),
    "tiny_att_layer": LegacyFlag(
        "v5 peft", silent=("-999", "-1", "0"), answer=N_("it says where tiny attention goes, which is off here")
    ),
    "dropout": LegacyFlag("v5 peft", silent=("0", "0.0"), answer=_OWN_MODEL_PARTS, refused=True),
    "load_partial": LegacyFlag("v5 v7 peft", silent=("0",), answer=_OWN_MODEL_PARTS, refused=True),
    # RWKV-PEFT.
    "peft": LegacyFlag("peft", silent=("none",), answer=_OWN_ADAPTERS, refused=True),
    "train_parts": LegacyFlag("peft", answer=_OWN_ADAPTERS, refused=True, arity="many"),
    "lora_config": LegacyFlag("peft", answer=_OWN_ADAPTERS, refused=True),
    "pissa_config": LegacyFlag("peft", answer=_OWN_ADAPTERS, refused=True),
    "bone_config": LegacyFlag("peft", answer=_OWN_ADAPTERS, refused=True),
    "disha_config": LegacyFlag("peft", answer=_OWN_ADAPTERS, refused=True),
    "miss_config": LegacyFlag("peft", answer=_OWN_ADAPTERS, refused=True),
    "peft_config": LegacyFlag("peft", answer=_OWN_ADAPTERS, refused=True),
    "merge": LegacyFlag("peft", silent=("1",), answer=_OWN_ADAPTERS, refused=True),
    "quant": LegacyFlag("peft", silent=("none",), answer=_QUANT, refused=True),
    "train_type": LegacyFlag("v5 peft", silent=("", "none", "finetune"), answer=_STATE, refused=True),
    "state_tune": LegacyFlag("peft", answer=_STATE, refused=True, arity="none"),
    "chunk_ctx": LegacyFlag("peft", answer=N_("it only matters with --train_type infctx")),
    "dataload": LegacyFlag("peft", silent=("get",), answer=_OWN_DATA_PARTS, refused=True),
    "sft_field": LegacyFlag("peft", answer=_SFT, refused=True, arity="many"),
    "sft_split": LegacyFlag("peft", silent=("train",), answer=_SFT, refused=True),
    "lr_schedule": LegacyFlag(
        "peft",
        silent=("cos",),
        answer=N_("the schedule is a cosine from lr_init to lr_final after a linear warm-up"),
        refused=True,
    ),
    # PyTorch Lightning 1.9, through `Trainer.add_argparse_args`.
    "max_epochs": LegacyFlag("pl", silent=("-1",), answer=N_("the run ends at my_exit_tokens or after epoch_count")),
    "max_steps": LegacyFlag("pl", silent=("-1",), answer=N_("the run ends at my_exit_tokens or after epoch_count")),
    "resume_from_checkpoint": LegacyFlag(
        "pl",
        silent=("None", ""),
        answer=N_("run the same command again: it goes on from the run directory (--proj_dir)"),
    ),
    "default_root_dir": LegacyFlag("pl", answer=N_("everything is written under --proj_dir")),
    "logger": LegacyFlag("pl", silent=("False",), answer=N_("use --wandb PROJECT or --tensorboard")),
    "num_processes": LegacyFlag("pl", answer=N_("use --devices")),
    "gpus": LegacyFlag("pl", answer=N_("use --accelerator gpu --devices N"), refused=True),
    "deterministic": LegacyFlag(
        "pl", answer=N_("on the CPU a run repeats bit for bit; on a GPU the order of sums may differ"), arity="optional"
    ),
    "detect_anomaly": LegacyFlag(
        "pl", answer=N_("a NaN or Inf always stops the run and names the first bad tensor"), arity="optional"
    ),
    "val_check_interval": LegacyFlag("pl", answer=N_("use --val_file and --val_every")),
    **{
        name: LegacyFlag("pl", silent=_LIGHTNING_OFF, answer=_LIGHTNING, arity="optional")
        for name in (
            "amp_backend",
            "amp_level",
            "auto_lr_find",
            "auto_scale_batch_size",
            "auto_select_gpus",
            "benchmark",
            "callbacks",
            "check_val_every_n_epoch",
            "enable_checkpointing",
            "enable_model_summary",
            "fast_dev_run",
            "gradient_clip_algorithm",
            "inference_mode",
            "ipus",
            "limit_predict_batches",
            "limit_test_batches",
            "limit_train_batches",
            "limit_val_batches",
            "log_every_n_steps",
            "max_time",
            "min_epochs",
            "min_steps",
            "move_metrics_to_cpu",
            "multiple_trainloader_mode",
            "num_sanity_val_steps",
            "overfit_batches",
            "plugins",
            "profiler",
            "reload_dataloaders_every_n_epochs",
            "replace_sampler_ddp",
            "sync_batchnorm",
            "tpu_cores",
            "track_grad_norm",
            "use_distributed_sampler",
        )
    },
}
"""Flag name with underscores, without dashes -> what becomes of it."""
