"""Flags of the reference trainers that are not leaves of the configuration, and values they write differently.

One table, so that an existing script runs unchanged when `python train.py` becomes `rookery train`. Each entry either
gives its value to a leaf (perhaps under another name), or is answered in one line that says what happens instead, or is
refused because going on would train something else than was asked for. The documentation page of flags is made from it.

`TRAINERS` lists which flags each trainer has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from rookery.i18n import N_

Arity = Literal["one", "none", "optional", "many"]

NOT_GIVEN = ""
"""In `LegacyFlag.values`: spelt like this, a flag leaves its leaf at the default, whatever the recipe says."""


@dataclass(frozen=True)
class LegacyFlag:
    """One flag of the reference trainers.

    Attributes:
        leaf: the leaf that takes the value; empty = none does.
        values: reference spelling -> ours, for a `leaf`; values not named here are passed on. None: the flag then says
            nothing about the leaf.
        elsewhere: reference spelling -> (leaf, value), where it says something about another leaf.
        keys: of a flag whose value is a JSON object: its keys -> our leaves.
        methods: values of `peft` with which the object of such a flag counts.
        words: word of its comma-separated value -> (leaf, the word for it in the list there).
        adds: leaf -> words that are added to its list.
        silent: values, in lower case, that ask for what Rookery does anyway, so nothing needs saying.
        answer: what happens instead (one sentence), for every other value; with a `leaf`, for the values it respells.
        refused: whether `answer` is an error.
        refusals: value, in lower case -> why it is an error (one sentence).
        defaults: what the trainer with this flag takes for leaves that are not given, where Rookery would not.
        arity: how many words follow the flag.
    """

    leaf: str = ""
    values: Mapping[str, str | None] = field(default_factory=dict)
    elsewhere: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    methods: tuple[str, ...] = ()
    words: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    adds: Mapping[str, str] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    answer: str = ""
    refused: bool = False
    refusals: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)
    arity: Arity = "one"


_AUTO = N_("Rookery chooses the kernel of each call itself; `rookery doctor` says which and why")
_LIGHTNING = N_("this setting of PyTorch Lightning does nothing here: Rookery has its own training loop")
_GPUS = N_("this kind of device is not one that Rookery knows: it takes the GPU that PyTorch calls cuda, or the CPU")
_QUANT = N_("the nearest of what Rookery has is taken: int8 or nf4")
_SFT = N_("the rows of data_file, a .jsonl or .json file, become conversations in the format of `template`")
_WDS_IMG = N_(
    "images were never finished in the reference, which refuses this type too: Rookery trains on text and tokens"
)

_MISS = {"mode": "miss_mode", "load": "adapter_load", "r": "lora_r"}

_OPTIMIZERS = {
    "none": NOT_GIVEN,
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "AdamW8bit", "PagedAdamW8bit"), "adamw8bit"),
}
"""RWKV-PEFT's, and what bitsandbytes and Hugging Face call the 8-bit form."""

_OTHER_OPTIMIZERS = dict.fromkeys(
    ("adam_mini", "muon", "lion"),
    N_("AdamW is the only optimiser (adamw, adamw8bit); the reference's other ones did not run"),
)

_LIGHTNING_OFF = ("false", "none", "0", "0.0", "-1", "")

LEGACY: dict[str, LegacyFlag] = {
    # Values that the reference spells differently.
    "load_model": LegacyFlag(leaf="load_model", values={"0": ""}),
    "dim_att": LegacyFlag(leaf="dim_att", values={"0": NOT_GIVEN}),
    "dim_ffn": LegacyFlag(leaf="dim_ffn", values={"0": NOT_GIVEN}),
    "magic_prime": LegacyFlag(leaf="magic_prime", values={"0": NOT_GIVEN}),
    "tiny_att_dim": LegacyFlag(leaf="tiny_att_dim", values={"-1": "0"}),
    "tiny_att_layer": LegacyFlag(leaf="tiny_att_layer", values={"-999": NOT_GIVEN, "-1": NOT_GIVEN}),
    "my_exit": LegacyFlag(leaf="my_exit", values={"99999999": NOT_GIVEN}),
    "data_type": LegacyFlag(leaf="data_type", values={"sft": "jsonl"}, answer=_SFT, refusals={"wds_img": _WDS_IMG}),
    "micro_bsz": LegacyFlag(leaf="micro_bsz", values={"auto": "0"}, silent=("auto",)),
    "accelerator": LegacyFlag(
        leaf="accelerator", values={"xpu": "auto", "npu": "auto", "musa": "auto", "mps": "auto"}, answer=_GPUS
    ),
    "train_type": LegacyFlag(
        leaf="train_type",
        values={"": None, "none": None, "finetune": None, "full": None},
        elsewhere={"state": ("peft", "state"), "states": ("peft", "state")},
        silent=("", "none", "finetune", "full"),
    ),
    "peft": LegacyFlag(leaf="peft", values={"bone": "miss", "disha": "miss"}, silent=("bone", "disha")),
    "quant": LegacyFlag(
        leaf="quant",
        values={"Int8": "int8", "NF4": "nf4", "4bit": "nf4", "fp4": "nf4", "fp8": "int8"},
        silent=("int8", "nf4"),
        answer=_QUANT,
    ),
    "epoch_count": LegacyFlag(leaf="epoch_count", values={"999999": NOT_GIVEN}),
    "precision": LegacyFlag(
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
        leaf="strategy",
        values={
            "single-device": "single",
            "single_device": "single",
            "deepspeed": "deepspeed_stage_2",
            "ddp_find_unused_parameters_false": "ddp",
        },
    ),
    "kernel": LegacyFlag(
        leaf="kernel", values={"": "auto", "@rwkv3": "auto"}, silent=("",), answer=_AUTO, arity="optional"
    ),
    # Renamed.
    "my_testing": LegacyFlag(leaf="version", values={"": NOT_GIVEN}),
    "rwkv_version": LegacyFlag(leaf="version"),
    "head_size_a": LegacyFlag(leaf="head_size"),
    "my_pile_stage": LegacyFlag(leaf="train_stage", defaults={"version": "x052"}),
    "gradient_clip_val": LegacyFlag(leaf="grad_clip", values={"None": NOT_GIVEN}),
    "op": LegacyFlag(leaf="kernel", values={"cuda": "auto"}, answer=_AUTO),
    # What is done anyway, or by itself.
    "enable_progress_bar": LegacyFlag(
        silent=("true", "1"),
        answer=N_("the progress display shows itself on a terminal only; elsewhere plain lines are printed"),
    ),
    "compile": LegacyFlag(silent=("0",), answer=_AUTO, arity="optional"),
    "fla": LegacyFlag(leaf="kernel", values={"": "fla"}, silent=("",), arity="none"),
    "fla_npu": LegacyFlag(answer=_AUTO, arity="none"),
    "fused_kernel": LegacyFlag(answer=_AUTO, arity="none"),
    "optim": LegacyFlag(leaf="optimizer", values=_OPTIMIZERS, refusals=_OTHER_OPTIMIZERS),
    "optimizer": LegacyFlag(leaf="optimizer", values=_OPTIMIZERS, refusals=_OTHER_OPTIMIZERS),
    "avg_loss": LegacyFlag(
        silent=("0", "1"),
        answer=N_("the loss of an optimiser step is always the mean over its trained tokens"),
    ),
    "l2warp_sparse": LegacyFlag(
        silent=("0",), answer=N_("the L2 term on the largest logit is always added, in its current form")
    ),
    "my_ffn_shift": LegacyFlag(silent=("1",), answer=N_("no published code reads this flag: token shift is always on")),
    "my_att_shift": LegacyFlag(silent=("1",), answer=N_("no published code reads this flag: token shift is always on")),
    # RWKV-PEFT.
    "lora_config": LegacyFlag(
        keys={
            "lora_load": "adapter_load",
            "lora_r": "lora_r",
            "lora_alpha": "lora_alpha",
            "lora_dropout": "lora_dropout",
        },
        methods=("lora", "dora"),
    ),
    "pissa_config": LegacyFlag(
        keys={
            "pissa_load": "adapter_load",
            "pissa_init": "pissa_init",
            "pissa_r": "lora_r",
            "svd_niter": "svd_niter",
        },
        methods=("pissa",),
    ),
    "bone_config": LegacyFlag(
        keys={"bone_load": "adapter_load", "bone_r": "lora_r", "bone_mode": "miss_mode"}, methods=("miss",)
    ),
    "disha_config": LegacyFlag(keys=_MISS, methods=("miss",)),
    "miss_config": LegacyFlag(keys=_MISS, methods=("miss",)),
    "peft_config": LegacyFlag(
        keys={
            "r": "lora_r",
            "lora_alpha": "lora_alpha",
            "lora_dropout": "lora_dropout",
            "use_rslora": "rslora",
            "target_modules": "target_modules",
        },
        methods=("lora", "dora", "pissa", "miss"),
    ),
    # RWKV Runner.
    "lora": LegacyFlag(
        leaf="peft",
        values={"": "lora"},
        silent=("",),
        defaults={
            "lora_r": "8",
            "lora_alpha": "32",
            "lora_dropout": "0.01",
            "target_modules": "att",
            "train_parts": "ln time",
        },
        arity="none",
    ),
    "lora_load": LegacyFlag(leaf="adapter_load"),
    "lora_parts": LegacyFlag(
        words={
            "att": ("target_modules", "att"),
            "ffn": ("target_modules", "ffn"),
            "time": ("train_parts", "time"),
            "ln": ("train_parts", "ln"),
        }
    ),
    "emb": LegacyFlag(adds={"train_parts": "emb head"}, arity="none"),
    "state_tune": LegacyFlag(leaf="peft", values={"": "state"}, silent=("",), arity="none"),
    "lr_schedule": LegacyFlag(
        silent=("cos",),
        answer=N_("the schedule is a cosine from lr_init to lr_final after a linear warm-up"),
        refused=True,
    ),
    # PyTorch Lightning 1.9, through `Trainer.add_argparse_args`.
    "max_epochs": LegacyFlag(silent=("-1",), answer=N_("the run ends at my_exit_tokens or after epoch_count")),
    "max_steps": LegacyFlag(silent=("-1",), answer=N_("the run ends at my_exit_tokens or after epoch_count")),
    "resume_from_checkpoint": LegacyFlag(
        silent=("none", ""),
        answer=N_("run the same command again: it goes on from the run directory (--proj_dir)"),
    ),
    "default_root_dir": LegacyFlag(answer=N_("everything is written under --proj_dir")),
    "logger": LegacyFlag(silent=("false",), answer=N_("use --wandb PROJECT or --tensorboard")),
    "num_processes": LegacyFlag(answer=N_("use --devices")),
    "gpus": LegacyFlag(answer=N_("use --accelerator gpu --devices N"), refused=True),
    "deterministic": LegacyFlag(
        answer=N_("on the CPU a run repeats bit for bit; on a GPU the order of sums may differ"), arity="optional"
    ),
    "detect_anomaly": LegacyFlag(
        answer=N_("a NaN or Inf always stops the run and names the first bad tensor"), arity="optional"
    ),
    "val_check_interval": LegacyFlag(answer=N_("use --val_file and --val_every")),
    **{
        name: LegacyFlag(silent=_LIGHTNING_OFF, answer=_LIGHTNING, arity="optional")
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

_COMMON = """
load_model wandb proj_dir random_seed data_file data_type vocab_size ctx_len epoch_steps epoch_count epoch_begin
epoch_save micro_bsz n_layer n_embd dim_att dim_ffn lr_init lr_final warmup_steps beta1 beta2 adam_eps grad_cp
weight_decay ds_bucket_mb load_partial magic_prime my_testing my_exit_tokens accelerator strategy devices num_nodes
precision accumulate_grad_batches
"""

_V5 = """
pre_ffn head_qk tiny_att_dim tiny_att_layer dropout weight_decay_final my_pile_version my_pile_stage my_pile_shift
my_pile_edecay layerwise_lr my_sample_len my_ffn_shift my_att_shift head_size_a head_size_divisor my_pos_emb my_qa_mask
my_random_steps my_exit
"""

TRAINERS: dict[str, tuple[str, ...]] = {
    "RWKV-LM v5": (*_COMMON.split(), *_V5.split(), "train_type", "grad_clip"),
    "RWKV-LM v7": (*_COMMON.split(), *"grad_clip train_stage head_size head_chunk kernel".split()),
    "RWKV-LM-V7": (
        *_COMMON.split(),
        *"grad_clip train_stage head_size head_chunk kernel compile enable_progress_bar".split(),
    ),
    "RWKV-PEFT": (
        *_COMMON.split(),
        *_V5.split(),
        *"""
        rwkv_version peft train_parts l2warp_sparse lora_config pissa_config bone_config disha_config miss_config
        peft_config merge quant dataload state_tune chunk_ctx fla fla_npu train_type loss_mask mask_id data_shuffle
        optim optimizer avg_loss compile sft_field sft_split op fused_kernel lr_schedule num_workers
        """.split(),
    ),
    "RWKV Runner": (
        *_COMMON.split(),
        *_V5.split(),
        *"emb lora lora_load lora_r lora_alpha lora_dropout lora_parts".split(),
    ),
    "PyTorch Lightning 1.9": tuple(
        """
        logger enable_checkpointing callbacks default_root_dir gradient_clip_val gradient_clip_algorithm num_nodes
        num_processes devices gpus auto_select_gpus tpu_cores ipus enable_progress_bar overfit_batches track_grad_norm
        check_val_every_n_epoch fast_dev_run accumulate_grad_batches max_epochs min_epochs max_steps min_steps max_time
        limit_train_batches limit_val_batches limit_test_batches limit_predict_batches val_check_interval
        log_every_n_steps accelerator strategy sync_batchnorm precision enable_model_summary num_sanity_val_steps
        resume_from_checkpoint profiler benchmark deterministic reload_dataloaders_every_n_epochs auto_lr_find
        replace_sampler_ddp use_distributed_sampler detect_anomaly auto_scale_batch_size plugins amp_backend amp_level
        move_metrics_to_cpu multiple_trainloader_mode inference_mode
        """.split()
    ),
}
"""Trainer -> its flags. RWKV-LM v5 and v7 and RWKV Runner also take those of Lightning; the two trees of RWKV-PEFT are
one here."""
